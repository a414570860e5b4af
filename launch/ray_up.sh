#!/usr/bin/env bash
# Start this machine's Ray node with token authentication on and the dashboard on loopback.
#
#   launch/ray_up.sh head TOKEN_FILE [options of ray start]
#   launch/ray_up.sh node TOKEN_FILE HEAD_ADDRESS:PORT [options of ray start]
#
# `head` writes a new token, readable by its owner only, at every start; a shared file system
# carries it to the other nodes and to whoever submits jobs. It is in no command line and no log.
set -euo pipefail
role=${1:?head or node}
export RAY_AUTH_TOKEN_PATH=${2:?a file for the token} RAY_AUTH_MODE=token
shift 2
case $role in
head)
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH.new")
    mv "$RAY_AUTH_TOKEN_PATH.new" "$RAY_AUTH_TOKEN_PATH"
    exec ray start --head --dashboard-host=127.0.0.1 --disable-usage-stats "$@"
    ;;
node)
    address=${1:?address of the head, as 10.0.0.1:6379}
    shift
    [ -s "$RAY_AUTH_TOKEN_PATH" ] || { echo "ray_up.sh: no token in $RAY_AUTH_TOKEN_PATH; start the head first" >&2; exit 2; }
    exec ray start --address="$address" --disable-usage-stats "$@"
    ;;
*)
    echo "ray_up.sh: $role; expected head or node" >&2
    exit 2
    ;;
esac
