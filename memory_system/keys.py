"""Key files: who a program is on the wire, and which service it trusts. pyzmq and the standard library alone.

    key = load_key_file("planner.key")
    apply_client(socket, key)
    socket.connect(endpoint)

A key file is text: `name`, `public`, `secret` and `server` (the service's public key), one `field: value` a line.
Keys are those of CURVE (https://rfc.zeromq.org/spec/26/), 40 characters of Z85 each.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zmq

from memory_system.errors import ConfigError

if TYPE_CHECKING:
    from memory_system.settings import SecuritySettings, Settings

KEY_FILE_VARIABLE: Final = "MEMORY_KEY_FILE"
SERVICE: Final = "service"
SERVICE_KEY_FILE: Final = f"{SERVICE}.key"
SERVICE_PUBLIC_FILE: Final = f"{SERVICE}.pub"
GRANTS_FILE: Final = "grants.yaml"

# Names stand in files, logs, and beside each other in the scope of a request: nothing that separates is part of one.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")

_FIELDS: Final = ("name", "public", "secret", "server")
_MAX_FILE_BYTES: Final = 4096
_LEAST_LIBZMQ: Final = (4, 3, 5)  # the first without known flaws of CURVE


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A name, its key pair, and the public key of the service; keys as Z85 of 40 bytes."""

    name: str
    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


def service_key_path(security: SecuritySettings) -> Path:
    """Where the secret of this host's binding sockets lies, if there is one."""
    return Path(security.keys_dir) / SERVICE_KEY_FILE


def curve_on(security: SecuritySettings) -> bool:
    """Whether this host's sockets are CURVE sockets. Raises ConfigError when they are to be and have no key.

    Grants without the service's key are keys of which one was lost: to go on without any would let everybody in.
    """
    if security.curve == "off":
        return False
    path = service_key_path(security)
    if _is_there(path):
        return True
    if security.curve == "on":
        raise ConfigError(f"security.curve is on and {path} does not exist; make it: make keys")
    if _is_there(path.with_name(GRANTS_FILE)):
        raise ConfigError(
            f"{path} is gone, and the keys that were granted beside it count for nothing without; restore it, or, for "
            "callers without keys, set security.curve to off"
        )
    return False


def key_for(program: str, settings: Settings) -> KeyFile | None:
    """The key of a program: on the service's host the one in `security.keys_dir`, elsewhere that of MEMORY_KEY_FILE,
    None where there is none. Raises ConfigError, with what to do."""
    security = settings.security
    if not curve_on(security):
        return key_of_environment()
    path = Path(security.keys_dir) / f"{program}.key"
    if not path.exists():
        raise ConfigError(f"{path}, the key of {program}, does not exist; make it: make keys")
    return load_key_file(path)


def key_of_environment(environ: Mapping[str, str] = os.environ) -> KeyFile | None:
    """The key that MEMORY_KEY_FILE names, None when it names none. Raises ConfigError."""
    path = environ.get(KEY_FILE_VARIABLE)
    return load_key_file(path) if path else None


def key_given(given: str | os.PathLike[str] | KeyFile | None) -> KeyFile | None:
    """A key, that of a file, or, for None, that of the environment. Raises ConfigError."""
    if given is None:
        return key_of_environment()
    if given == "":
        raise ConfigError(f"key_file is empty: name a key file, or leave it out for that of {KEY_FILE_VARIABLE}")
    return given if isinstance(given, KeyFile) else load_key_file(given)


def load_key_file(path: str | os.PathLike[str]) -> KeyFile:
    """Read a key file. Raises ConfigError for one that others can read, or that is none; no message has a key."""
    where = Path(path)
    found = _parsed(_private_text(where), where)
    missing = [name for name in _FIELDS if name not in found]
    if missing:
        raise ConfigError(f"{where} has no {missing[0]}; it is no key file, or was cut short")
    key = KeyFile(found["name"], *(found[name].encode() for name in _FIELDS[1:]))
    check_curve()
    try:
        public, _ = zmq.curve_public(key.secret), zmq.curve_public(key.server)  # of the latter: whether it is a key
    except zmq.ZMQError:
        raise ConfigError(f"{where}: secret or server is not a key: its 40 characters are no 32 bytes in Z85") from None
    if public != key.public:
        raise ConfigError(f"{where}: public and secret are not of one pair")
    return key


def key_text(key: KeyFile, comment: str) -> str:
    """The text of a key file."""
    values = (key.name, key.public.decode(), key.secret.decode(), key.server.decode())
    return "".join([f"# {comment}\n", *(f"{name}: {value}\n" for name, value in zip(_FIELDS, values, strict=True))])


def write_private(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a file that its owner alone can read, whatever the umask. Raises FileExistsError unless `replace`."""
    target = path.with_name(f".{path.name}.new") if replace else path
    if replace:
        target.unlink(missing_ok=True)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if replace:
        os.replace(target, path)


def new_key(name: str, server: bytes | None = None) -> KeyFile:
    """A new pair; without `server` it is that of the service itself."""
    check_curve()
    public, secret = zmq.curve_keypair()
    return KeyFile(name, public, secret, public if server is None else server)


def apply_client(socket: zmq.Socket[Any], key: KeyFile | None) -> None:
    """Have a socket that will connect show this key and accept this service only; None changes nothing."""
    if key is None:
        return
    socket.setsockopt(zmq.CURVE_SERVERKEY, key.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)


def apply_server(socket: zmq.Socket[Any], key: KeyFile, domain: str) -> None:
    """Have a socket that will bind let in only whom the authenticator of its context lets into `domain`.

    Without domain or its enforcement libzmq lets every key in where no authenticator answers.
    """
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def check_curve() -> None:
    """Raise ConfigError where the installed libzmq has no CURVE, or one with known flaws."""
    if not zmq.has("curve"):
        raise ConfigError("the installed libzmq has no CURVE; install pyzmq from a wheel, or libzmq with libsodium")
    if zmq.zmq_version_info() < _LEAST_LIBZMQ:
        raise ConfigError(f"libzmq {zmq.zmq_version()} has known flaws of CURVE; install 4.3.5 or newer")


def check_private(path: Path, mode: int, *, readable: bool = False) -> None:
    """Raise ConfigError for a file that others than its owner can read (unless `readable`) or write."""
    loose = 0o022 if readable else 0o077
    if stat.S_IMODE(mode) & loose:
        verb, wanted = ("changed", "go-w") if readable else ("read or changed", "600")
        raise ConfigError(f"{path} can be {verb} by others (mode {stat.S_IMODE(mode):04o}); run: chmod {wanted} {path}")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise ConfigError(f"{path} cannot be looked for: {error.strerror}; is it another user's?") from None


def _private_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            check_private(path, os.fstat(file.fileno()).st_mode)
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than a key file")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no key file: it is not text") from None


def _parsed(text: str, path: Path) -> dict[str, str]:
    """field -> value. No message repeats what a line says: it may be a secret."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, value = (part.strip() for part in line.partition(":"))
        if not separator or name not in _FIELDS or name in found:
            raise ConfigError(f"{path}:{number}: expected each of {', '.join(_FIELDS)} once, as `field: value`")
        if not (NAME if name == "name" else KEY).fullmatch(value):
            what = "letters, digits, dots, dashes or underscores" if name == "name" else "40 characters of Z85"
            raise ConfigError(f"{path}:{number}: {name} is not of {what}")
        found[name] = value
    return found
