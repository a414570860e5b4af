"""Write preference pairs whose preference can be checked: answer first, then offer to go on.

The chosen answer states the fact and closes with one short question to the user; the rejected
answer states the same fact, adds a detail of about the same length, and stops. No network and no
model: a seed fixes both files. Every held-out question is about a subject that training never sees.

    python examples/quickstart/make_preferences.py --out data --seed 0 --train 256 --eval 64
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

COUNTRIES = """
France|Paris|Europe, Spain|Madrid|Europe, Italy|Rome|Europe, Germany|Berlin|Europe,
Portugal|Lisbon|Europe, Austria|Vienna|Europe, Poland|Warsaw|Europe, Hungary|Budapest|Europe,
Greece|Athens|Europe, Norway|Oslo|Europe, Sweden|Stockholm|Europe, Finland|Helsinki|Europe,
Denmark|Copenhagen|Europe, Ireland|Dublin|Europe, Belgium|Brussels|Europe, Croatia|Zagreb|Europe,
Iceland|Reykjavik|Europe, Romania|Bucharest|Europe, Bulgaria|Sofia|Europe, Serbia|Belgrade|Europe,
Japan|Tokyo|Asia, China|Beijing|Asia, India|New Delhi|Asia, Thailand|Bangkok|Asia,
Vietnam|Hanoi|Asia, South Korea|Seoul|Asia, Iran|Tehran|Asia, Iraq|Baghdad|Asia,
Nepal|Kathmandu|Asia, Jordan|Amman|Asia, Mongolia|Ulaanbaatar|Asia, Lebanon|Beirut|Asia,
Egypt|Cairo|Africa, Kenya|Nairobi|Africa, Ghana|Accra|Africa, Morocco|Rabat|Africa,
Nigeria|Abuja|Africa, Ethiopia|Addis Ababa|Africa, Uganda|Kampala|Africa, Senegal|Dakar|Africa,
Zambia|Lusaka|Africa, Tunisia|Tunis|Africa, Angola|Luanda|Africa, Rwanda|Kigali|Africa,
Peru|Lima|South America, Chile|Santiago|South America, Argentina|Buenos Aires|South America,
Colombia|Bogota|South America, Ecuador|Quito|South America, Uruguay|Montevideo|South America,
Venezuela|Caracas|South America, Canada|Ottawa|North America, Mexico|Mexico City|North America,
Cuba|Havana|North America, Australia|Canberra|Oceania, New Zealand|Wellington|Oceania
"""

ELEMENTS = """
hydrogen|H|1, helium|He|2, lithium|Li|3, carbon|C|6, nitrogen|N|7, oxygen|O|8, fluorine|F|9,
neon|Ne|10, sodium|Na|11, magnesium|Mg|12, silicon|Si|14, phosphorus|P|15, sulfur|S|16,
chlorine|Cl|17, argon|Ar|18, potassium|K|19, calcium|Ca|20, titanium|Ti|22, chromium|Cr|24,
manganese|Mn|25, iron|Fe|26, cobalt|Co|27, nickel|Ni|28, copper|Cu|29, zinc|Zn|30, bromine|Br|35,
krypton|Kr|36, silver|Ag|47, tin|Sn|50, iodine|I|53, xenon|Xe|54, barium|Ba|56, tungsten|W|74,
platinum|Pt|78, gold|Au|79, mercury|Hg|80, lead|Pb|82, radon|Rn|86, uranium|U|92
"""

TOOLS = """
hammer|driving nails|a toolbox, saw|cutting wood|a workshop, screwdriver|turning screws|a toolbox,
thermometer|measuring temperature|a clinic, ruler|measuring length|a pencil case,
telescope|observing the stars|an observatory, microscope|looking at tiny things|a laboratory,
knife|cutting food|a kitchen, kettle|boiling water|a kitchen, broom|sweeping floors|a cupboard,
shovel|digging holes|a garden shed, rake|gathering leaves|a garden shed, bucket|carrying water|a shed,
pillow|resting the head|a bedroom, oven|baking food|a kitchen, lamp|lighting a room|a living room,
refrigerator|keeping food cold|a kitchen, clock|telling the time|a living room,
calendar|keeping track of dates|an office, camera|taking photographs|a studio,
needle|sewing clothes|a sewing kit, compass|finding directions|a backpack, key|opening locks|a pocket,
ladder|reaching high places|a garage, towel|drying the skin|a bathroom, comb|tidying hair|a bathroom,
toothbrush|cleaning the teeth|a bathroom, pencil|writing and drawing|a school bag,
eraser|removing pencil marks|a pencil case, calculator|doing sums|an office, stove|cooking food|a kitchen,
helmet|protecting the head|a bike shop, wheelbarrow|moving heavy loads|a garden,
stethoscope|listening to the heart|a hospital, umbrella|keeping off the rain|a hallway,
mirror|seeing yourself|a bathroom, blender|mixing food|a kitchen, candle|giving light|a church,
stapler|joining sheets of paper|an office, flashlight|seeing in the dark|a tent,
vacuum cleaner|cleaning carpets|a cupboard, paintbrush|spreading paint|a studio
"""

JOBS = """
baker|bakes bread and cakes|a bakery, teacher|teaches students|a school,
pilot|flies airplanes|an airport, nurse|cares for patients|a hospital,
farmer|grows crops and raises animals|a farm, chef|cooks meals|a restaurant,
librarian|helps people find books|a library, mechanic|repairs cars|a garage,
carpenter|builds things from wood|a workshop, plumber|repairs pipes|a workshop,
firefighter|puts out fires|a fire station, judge|decides legal cases|a court,
dentist|treats teeth|a clinic, veterinarian|treats sick animals|a clinic,
architect|designs buildings|an office, photographer|takes photographs|a studio,
journalist|reports the news|a newsroom, barber|cuts hair|a barbershop,
florist|sells flowers|a flower shop, gardener|looks after plants|a park,
astronomer|studies stars and planets|an observatory, biologist|studies living things|a laboratory,
geologist|studies rocks|a laboratory, historian|studies the past|a university,
waiter|serves food and drinks|a restaurant, cashier|takes payments|a supermarket,
lifeguard|keeps swimmers safe|a pool, actor|plays roles|a theater, tailor|makes clothes|a workshop,
accountant|keeps financial records|an office, pharmacist|prepares medicines|a pharmacy,
miner|digs minerals out of the ground|a mine, shepherd|looks after sheep|a farm,
potter|makes pots from clay|a studio, surgeon|performs operations|a hospital,
electrician|installs wiring|a workshop, butcher|cuts and sells meat|a shop,
lawyer|gives legal advice|an office, painter|paints pictures|a studio,
translator|translates texts|an office, programmer|writes software|an office
"""

ANIMALS = """
frog|an amphibian|ponds, toad|an amphibian|gardens, salamander|an amphibian|damp forests,
newt|an amphibian|ponds, eagle|a bird|mountains, penguin|a bird|cold seas, owl|a bird|woods,
ostrich|a bird|savannas, parrot|a bird|rainforests, swan|a bird|lakes, duck|a bird|ponds,
robin|a bird|gardens, shark|a fish|the sea, salmon|a fish|rivers, trout|a fish|rivers,
tuna|a fish|the sea, crocodile|a reptile|rivers, lizard|a reptile|deserts, turtle|a reptile|lakes,
cobra|a reptile|grasslands, ant|an insect|colonies, bee|an insect|hives, butterfly|an insect|meadows,
beetle|an insect|forests, tiger|a mammal|forests, lion|a mammal|savannas, dolphin|a mammal|the sea,
elephant|a mammal|savannas, kangaroo|a mammal|grasslands, wolf|a mammal|forests,
bat|a mammal|caves, whale|a mammal|the sea, giraffe|a mammal|savannas, bear|a mammal|forests,
horse|a mammal|stables, rabbit|a mammal|burrows
"""


@dataclass(frozen=True)
class Topic:
    """One table of subjects and the sentences made from a row of it.

    Templates may use {name}, {a_name}, {A_name}, {fact} and {detail}.
    """

    table: str
    questions: tuple[str, str, str]
    statement: str
    details: tuple[str, ...]
    offers: tuple[str, ...]
    joined: str


TOPICS = (
    Topic(
        COUNTRIES,
        (
            "What is the capital of {name}?",
            "Which city is the capital of {name}?",
            "Tell me the capital of {name}.",
        ),
        "The capital of {name} is {fact}.",
        ("{name} is a country in {detail}.", "The country is part of {detail}."),
        (
            "Would you like to know more about {name}?",
            "Shall I tell you more about the city?",
        ),
        "The capital of {name}, which is a country in {detail}, is the city of {fact}.",
    ),
    Topic(
        ELEMENTS,
        (
            "What is the chemical symbol for {name}?",
            "Which symbol stands for {name} in the periodic table?",
            "Give me the chemical symbol of {name}.",
        ),
        "The chemical symbol for {name} is {fact}.",
        ("The atomic number of {name} is {detail}.",),
        (
            "Would you like to know more about {name}?",
            "Shall I tell you what {name} is used for?",
        ),
        "The chemical symbol for {name}, which has the atomic number {detail}, is {fact}.",
    ),
    Topic(
        TOOLS,
        (
            "What is {a_name} used for?",
            "Why would I need {a_name}?",
            "Tell me what {a_name} is for.",
        ),
        "{A_name} is used for {fact}.",
        ("You can often find one in {detail}.", "People often keep one in {detail}."),
        (
            "Would you like to know how to use one?",
            "Shall I tell you how to choose a good one?",
        ),
        "{A_name} is a useful thing, often found in {detail}, that is used for {fact}.",
    ),
    Topic(
        JOBS,
        (
            "What does {a_name} do?",
            "What is the job of {a_name}?",
            "Tell me what {a_name} does at work.",
        ),
        "{A_name} {fact}.",
        ("Someone in this job often works in {detail}.", "The usual place of work is {detail}."),
        (
            "Would you like to know how to become one?",
            "Shall I tell you more about the job?",
        ),
        "{A_name} is a person, often working in {detail}, who {fact}.",
    ),
    Topic(
        ANIMALS,
        (
            "What kind of animal is {a_name}?",
            "Which group of animals does {a_name} belong to?",
            "Tell me what kind of animal {a_name} is.",
        ),
        "{A_name} is {fact}.",
        ("Such animals often live in {detail}.", "It can often be seen in {detail}."),
        (
            "Would you like to know what it eats?",
            "Shall I tell you more about this animal?",
        ),
        "{A_name}, an animal that often lives in {detail}, is {fact}.",
    ),
)
