"""Hosts made of namespaces: each its own network, processes, hostname, /tmp, /dev/shm, home and sshd on this machine.

They see this checkout read-only and write into memory. One switch, in a namespace of its own, joins them; nothing of it
touches the network of the machine. `ray up` runs on them as on any. Needs root, iproute2, openssh-server, rsync.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "rsync": "rsync",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}

# What each host has of its own, so that nothing of this machine's is seen there.
OWN = ["/dev", "/proc", "/run", "/sys", "/tmp"]

# PID 1 of a host; arguments: name, address, folder. What the host writes goes to a tmpfs over the machine's own root.
_INIT = """\
set -eu
name=$1 address=$2 lab=$3
hostname "$name"
ip link set lo up
mount --make-rprivate /
mkdir -p "$lab/$name"
mount -t tmpfs -o size=4g,mode=755 tmpfs "$lab/$name"
mkdir "$lab/$name/upper" "$lab/$name/work" "$lab/$name/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$lab/$name/upper,workdir=$lab/$name/work" "$lab/$name/root"
root=$lab/$name/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o size=1g,mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o size=3g,mode=1777 tmpfs "$root/tmp"
rm -rf "$root/root/.ray" "$root/root/.ssh" "$root/root/.profile"
mkdir -p "$root/run/sshd" "$root/root/.ssh"
cp "$lab/hosts" "$root/etc/hosts"
echo "$name" > "$root/etc/hostname"
cp "$lab/key.pub" "$root/root/.ssh/authorized_keys"
install -m 600 "$lab/host_key" "$root/run/host_key"
cp "$lab/bashrc" "$root/root/.bashrc"
echo '. ~/.bashrc' > "$root/root/.bash_profile"
if [ "$name" = user ]; then install -m 600 "$lab/key" "$root/root/.ssh/key"; fi
exec chroot "$root" /usr/sbin/sshd -D -e -h /run/host_key -o ListenAddress="$address" -o PidFile=/run/sshd.pid \\
  -o PasswordAuthentication=no -o UsePAM=no -o StrictModes=no -o MaxStartups=50 -o MaxSessions=50 -f /dev/null
"""


def why_not() -> str:
    """Why there can be no such hosts on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({package for tool, package in NEEDED.items() if not shutil.which(tool, path=path)})
    if missing:
        return f"needs {', '.join(missing)} (Debian packages)"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {made.stderr.strip()}" if made.returncode else ""


class Hosts:
    """A switch with hosts on it; `user` is the machine of the user who starts the cluster, and alone has the key.

    Args:
        folder: for keys and mounts; short, since sockets below it have a longest path.
        names: of the hosts besides `user`.
        variables: that every shell on every host has.
    """

    def __init__(self, folder: Path, names: list[str], variables: dict[str, str]) -> None:
        for path in (ROOT, folder):
            if any(path.is_relative_to(place) for place in OWN):
                raise ValueError(
                    f"{path} cannot be seen by hosts of namespaces: each has its own {', '.join(OWN)}. Put it elsewhere"
                )
        self.folder, self._prefix = folder, f"sg{os.getpid()}"
        self.addresses = {name: f"10.79.0.{10 + number}" for number, name in enumerate(["user", *names])}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True)
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        path = f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        exports = {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **variables}
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
        (folder / "bashrc").write_text(text)
        (folder / "init.sh").write_text(_INIT)

    def __enter__(self) -> Hosts:
        try:
            self._ip("netns", "add", f"{self._prefix}-sw")
            self._on_switch("link", "add", "br0", "type", "bridge")
            self._on_switch("link", "set", "br0", "up")
            for name, address in self.addresses.items():
                space, port = f"{self._prefix}-{name}", f"p-{name}"
                self._ip("netns", "add", space)
                self._on_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                self._on_switch("link", "set", port, "master", "br0", "up")
                self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                self._ip("-n", space, "link", "set", "eth0", "up")
                log = (self.folder / f"{name}.log").open("wb")
                command = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]
                command += ["--kill-child", "bash", str(self.folder / "init.sh"), name, address, str(self.folder)]
                self._processes[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )
                log.close()
            for name in self.addresses:
                self._wait_until_up(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Power off, and take all away."""
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)  # and with it all processes of the host: --kill-child
            process.wait()
        for name in [*self.addresses, "sw"]:
            subprocess.run(["ip", "netns", "del", f"{self._prefix}-{name}"], capture_output=True)

    def command(self, host: str, text: str) -> list[str]:
        """The command line that runs a shell command on a host, as root's login shell would."""
        inside = ["nsenter", "-t", str(self._first(host)), "-n", "-u", "-i", "-p", "-m", "-r", "-w", "--"]
        clean = ["env", "-i", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8", "USER=root"]
        return [*inside, *clean, "bash", "--login", "-c", f"cd {ROOT} && {text}"]

    def run(self, host: str, text: str, timeout_s: float = 300, check: bool = True) -> str:
        """What a shell command prints on a host, errors included."""
        command = self.command(host, text)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s)
        assert done.returncode == 0 or not check, f"{host}: {text}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        self._on_switch("link", "set", f"p-{host}", "down")

    def mend(self, host: str) -> None:
        self._on_switch("link", "set", f"p-{host}", "up")

    def _first(self, host: str) -> int:
        """PID 1 of a host, as the machine sees it."""
        # `ip netns exec` becomes `unshare`, whose only child is the host's first process.
        listed = Path(f"/proc/{self._processes[host].pid}/task/{self._processes[host].pid}/children").read_text()
        return int(listed.split()[0])

    def _wait_until_up(self, host: str) -> None:
        deadline = time.monotonic() + 120
        probe = f"exec 3<>/dev/tcp/{self.addresses[host]}/22"
        while subprocess.run(
            ["ip", "netns", "exec", f"{self._prefix}-{host}", "bash", "-c", probe], capture_output=True
        ).returncode:
            log = (self.folder / f"{host}.log").read_text()
            assert self._processes[host].poll() is None, f"{host} did not come up: {log}"
            assert time.monotonic() < deadline, f"{host} did not come up: {log}"
            time.sleep(0.1)

    def _on_switch(self, *words: str) -> None:
        self._ip("-n", f"{self._prefix}-sw", *words)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)
