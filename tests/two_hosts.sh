#!/usr/bin/env bash
# Run a command on two hosts at once: network namespaces of this machine, `first` and `second`, joined by a cable.
# usage: bash tests/two_hosts.sh COMMAND ...; ends with the first host's exit code, when both have ended. Needs iproute2,
# util-linux and user namespaces, but not root.
set -euo pipefail
if [ -z "${TWO_HOSTS:-}" ]; then
  TWO_HOSTS=made exec unshare --user --map-root-user --net --uts --mount bash "$0" "$@"
fi
hosts=$(mktemp)
printf '127.0.0.1 localhost\n10.77.0.1 first\n10.77.0.2 second\n' > "$hosts"
mount --bind "$hosts" /etc/hosts
rm "$hosts"
# The second host is the namespace of this process, which ends when its input is closed.
exec {second_lives}> >(exec unshare --net --uts cat)
second=$!
trap 'exec {second_lives}>&-' EXIT
until [ "$(readlink "/proc/$second/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
on_second() { nsenter --target "$second" --net --uts "$@"; }
hostname first
on_second hostname second
ip link add cable type veth peer name cable netns "$second"
ip address add 10.77.0.1/24 dev cable
on_second ip address add 10.77.0.2/24 dev cable
for device in lo cable; do
  ip link set "$device" up
  on_second ip link set "$device" up
done
export GLOO_SOCKET_IFNAME=cable
on_second "$@" > >(sed 's/^/second: /' >&2) 2>&1 &
other=$!
code=0
"$@" || code=$?
wait "$other" || true
exit "$code"
