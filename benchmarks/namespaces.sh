#!/bin/sh
# Run a federation over TLS in three network namespaces, as if on three machines. Requires root.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
finish() {
    for place in server berlin paris; do ip netns del "fed-$place" 2>/dev/null || true; done
    ip link del fed-bridge 2>/dev/null || true
    rm -rf "$folder"
}
trap finish EXIT INT TERM

ip link add fed-bridge type bridge
ip link set fed-bridge up
number=1
for place in server berlin paris; do
    ip netns add "fed-$place"
    ip link add "fed-$number" type veth peer name eth0 netns "fed-$place"
    ip link set "fed-$number" master fed-bridge up
    ip -n "fed-$place" addr add "10.9.0.$number/24" dev eth0
    ip -n "fed-$place" link set eth0 up
    ip -n "fed-$place" link set lo up
    number=$((number + 1))
done

python -m federation.certificates "$folder/keys" --server 10.9.0.1 --client berlin paris
for place in berlin paris; do
    ip netns exec "fed-$place" python client.py --server 10.9.0.1:8080 --tls "$folder/keys/$place" --threads 1 &
done
ip netns exec fed-server python server.py --address 10.9.0.1:8080 --tls "$folder/keys" --data "${DATA:-embedded}" "$@"
wait
