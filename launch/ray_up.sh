#!/usr/bin/env bash
# Start this machine's Ray node with token authentication on and the dashboard on loopback.
#
#   launch/ray_up.sh head TOKEN_FILE [options of ray start]
#   launch/ray_up.sh node TOKEN_FILE HEAD_ADDRESS:PORT [options of ray start]
#
# `head` writes a new token, readable by its owner only, at every start; a shared file system
# carries it to the other nodes and to whoever submits jobs. It is in no command line and no log.
set -euo pipefail
refuse() {
    echo "ray_up.sh: $1; expected $2" >&2
    exit 2
}
usage="head TOKEN_FILE or node TOKEN_FILE HEAD_ADDRESS:PORT, then options of ray start"
role=${1:-nothing} token=${2:-} address=
case $role in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
head | node) [[ $token && $token != -* ]] || refuse "no file for the token" "$usage" ;;
*) refuse "$role" "$usage" ;;
esac
shift 2
if [ "$role" = node ]; then
    address=${1:-}
    [[ $address && $address != -* ]] || refuse "no address of the head" "$usage"
    shift
fi
# Ray's own parser looks at the options before a new token makes the old one invalid.
ray start "$@" --help >/dev/null
export RAY_AUTH_TOKEN_PATH=$token RAY_AUTH_MODE=token
if [ "$role" = head ]; then
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token.new")
    mv "$token.new" "$token"
    exec ray start --head --dashboard-host=127.0.0.1 --disable-usage-stats "$@"
fi
[ -s "$token" ] || refuse "no token in $token" "one there: start the head first"
exec ray start --address="$address" --disable-usage-stats "$@"
