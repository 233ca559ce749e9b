"""What a host sees in place of this machine's own files below /etc: names, keys, ssh's settings."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.cluster.needs import tool

# MaxStartups: ten connections that log in at a time are the most by default, and others are dropped by chance.
_SSHD_CONFIG = """\
ListenAddress 0.0.0.0
ListenAddress ::
HostKey /etc/ssh/id
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 1000
PidFile none
"""
_SSH_CONFIG = """\
Host *
IdentityFile /etc/ssh/id
IdentitiesOnly yes
UserKnownHostsFile /dev/null
BatchMode yes
"""


def make_key(path: Path) -> None:
    """One key serves as each host's own and as the user's."""
    command = [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)


def write_etc(
    folder: Path, addresses: Mapping[str, str], key: Path, *, accepted: str | None
) -> list[tuple[Path, Path]]:
    """Write a host's files into ``folder``, anew, and return where each belongs: (what, where).

    Args:
        addresses: of each name, for /etc/hosts.
        key: the private key; the public one lies beside it.
        accepted: the public key that may log in; None: nobody may.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
    user = pwd.getpwuid(os.getuid())
    # sshd refuses a user whose password is locked with "!", as root's is on Ubuntu.
    (folder / "shadow").write_text(f"{user.pw_name}:*:19000:0:99999:7:::\n")
    for path in (key, key.with_suffix(".pub")):
        shutil.copy(path, ssh / path.name)
    (ssh / "authorized_keys").write_text(accepted or "")
    # All hosts are known: ssh asks nothing and warns of nothing.
    (ssh / "ssh_known_hosts").write_text("* " + key.with_suffix(".pub").read_text())
    (ssh / "sshd_config").write_text(_SSHD_CONFIG)
    (ssh / "ssh_config").write_text(_SSH_CONFIG)
    binds = [(folder / "hosts", Path("/etc/hosts")), (folder / "shadow", Path("/etc/shadow"))]
    binds += [(ssh, Path("/etc/ssh"))]
    own_ssh = Path(user.pw_dir) / ".ssh"
    if own_ssh.is_dir():  # the keys and settings of whoever runs the tests
        (folder / "no-ssh").mkdir(mode=0o700)
        binds += [(folder / "no-ssh", own_ssh)]
    for name in (".bashrc", ".zshenv"):  # and what their shell does at every login, for seconds sometimes
        own = Path(user.pw_dir) / name
        if own.is_file():
            (folder / name).touch()
            binds += [(folder / name, own)]
    return binds
