"""The Hub: calls that are repeated while it is busy, and a look at it before training.

Knows no versions. Tokens go into requests and nowhere else: what is told is `redacted`, and what
the client raises, which holds the request with its header, is no cause of what is raised here.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote, quote_plus

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from merge_callback.errors import (
    CorruptVersion,
    MergeRefused,
    PushRefused,
    PushStopped,
)
from merge_callback.foreign import plain

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds between tries
QUICK = DELAYS[:3]
LONGEST_WAIT = 300.0  # seconds; a Hub that asks for more is asked again by the next push
PREFLIGHT = 120.0  # seconds
SILENCE = 600.0  # seconds that one call may take without a file
SLOWEST = 1e5  # bytes a second; a slower upload counts as stalled
_LONGEST_ID = 96
_BUSY = (408, 409, 412, 425, 429)  # and 5xx: the same request may succeed a little later
_PERMANENT = (
    CorruptVersion,
    HFValidationError,
    LocalTokenNotFoundError,
    MergeRefused,
    OfflineModeIsEnabled,
    PushStopped,
)
_SECRET = re.compile(r"hf_[\w.~+/=-]*\w|(?i:(?<=Bearer )|(?<=Basic )|(?<=HF_TOKEN=))[^\s'\"]+")
_SHORTEST_TOKEN = 4  # characters; of a shorter one nothing would be left of a text
_MOST_TOLD = 500  # characters of what the Hub says
_used: set[str] = set()  # tokens that were given to a client of ours
_TOKENS = "https://huggingface.co/settings/tokens"
_CURES = {
    401: f"the token is missing, wrong or expired: make one at {_TOKENS} and log in with "
    "`hf auth login`, set HF_TOKEN, or set hub_token",
    402: "the account has to pay for this: free some storage, or choose another hub_model_id",
    403: "the token may not do this: give it write access to the repository at "
    f"{_TOKENS}, or choose another hub_model_id",
    404: "the repository is not there, or hidden from this token: check hub_model_id and hub_token",
    429: "that is the Hub's rate limit: wait some minutes",
}
_LATER = "the Hub could not be reached or was busy: check the network, or try later"
_ODD = "the Hub's answer cannot be used: try later; if that does not help, update huggingface_hub"


@dataclass(frozen=True)
class Target:
    """Where on the Hub versions go.

    Attributes:
        repo_id: with its namespace.
        private: whether a repository that has to be made is; None: as its namespace has it.
        revision: branch that has the newest version.
    """

    repo_id: str
    private: bool | None = True
    revision: str = "main"


class Hub:
    """The Hub as one user sees it.

    Args:
        token: None: HF_TOKEN, or that of `hf auth login`.
        delays: seconds between tries of a call; None: DELAYS.
    """

    def __init__(self, token: str | None = None, delays: Sequence[float] | None = None):
        # A line break from a file would be refused in a header, by an error that shows the token.
        token = token and token.strip()
        self.api = HfApi(token=token, library_name="merge_callback")
        _used.update([token] if token else [])
        self.stopped = threading.Event()
        self.deadline = float("inf")  # monotonic seconds; when the call under way is overdue
        self.sent = 0  # bytes
        self._delays = DELAYS if delays is None else delays

    def go_on(self) -> None:
        """Raise PushStopped if nobody waits any more."""
        if self.stopped.is_set():
            raise PushStopped("the push was stopped")

    def patiently(self, step: Callable[P, R], /, *args: P.args, **settings: P.kwargs) -> R:
        """Take a step that looks before it acts; take it again while the Hub is busy."""
        return self.send(0, step, *args, **settings)

    def send(self, nbytes: int, step: Callable[P, R], /, *args: P.args, **settings: P.kwargs) -> R:
        """The same for a step that sends `nbytes`; those the client repeats for minutes itself."""
        for delay in (*(self._delays[:2] if nbytes else self._delays), None):
            self.go_on()
            self.deadline = time.monotonic() + SILENCE + nbytes / SLOWEST
            try:
                done = step(*args, **settings)
                self.sent += nbytes
                return done
            except Exception as error:
                if delay is None or not passes(error):
                    raise
                wait = max(delay, _asked_to_wait(error))
                if wait > LONGEST_WAIT:
                    raise
                logger.info("%s; trying again in %.0f s", _told(error), wait)
            finally:
                self.deadline = float("inf")
            self.stopped.wait(wait)
        raise AssertionError("unreachable")


def explain(error: BaseException) -> str:
    """What happened and what to change, in one line."""
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return _CURES[401]
    if isinstance(error, _PERMANENT):
        return _told(error)
    cure = _CURES.get(status) if status is not None else None
    odd = isinstance(error, ValueError | TypeError | LookupError | AttributeError | RecursionError)
    return f"{_told(error)}; {cure or (_ODD if odd and status is None else _LATER)}"


def redacted(text: str) -> str:
    """A text without tokens: those in use, whatever they look like, and what looks like one."""
    for form in sorted(_forms(), key=len, reverse=True):
        text = text.replace(form, "***")
    return _SECRET.sub("***", text)


def _forms() -> Iterator[str]:
    """The tokens that may be in use here, as they may stand in a text."""
    known = {os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), *_used}
    with suppress(OSError, ValueError):  # get_token may ask a server
        known.add(Path(constants.HF_TOKEN_PATH).read_text("utf-8"))
    for token in {part for text in known if text for part in (text.strip(), *text.split())}:
        if len(token) < _SHORTEST_TOKEN:
            continue
        quoted = quote(token, safe="")
        yield from (token, quoted, quoted.lower(), quote(token), quote_plus(token))
        yield from (repr(token)[1:-1], json.dumps(token)[1:-1])
        yield base64.b64encode(token.encode("utf-8", "surrogatepass")).decode().rstrip("=")


def preflight(hub: Hub, repo_id: str, private: bool | None, taken: str | None = None) -> str:
    """Make sure that `repo_id` can be written to; it is made if it is not there.

    Args:
        taken: a repository that it must not be.

    Returns:
        `repo_id` with its namespace.

    Raises:
        PushRefused: what stands against it, and which setting to change.
    """
    problems = name_problems("hub_model_id", repo_id)
    if is_offline_mode():
        problems.append("HF_HUB_OFFLINE is set: unset it, or set hub_preflight=False")
    elif hub.api.token is None and get_token() is None:
        problems.append(f"there is no token: {_CURES[401]}")
    if problems:
        raise PushRefused(problems)
    try:
        return _within(PREFLIGHT, _writable, hub, repo_id, private, taken)
    except PushRefused as error:
        refused = error.problems
    except Exception as error:
        refused = (f"{repo_id}: {explain(error)}; hub_preflight=False starts without this check",)
    raise PushRefused(list(map(redacted, refused)))  # not in the handler: the cause has the token


def full_name(hub: Hub, repo_id: str) -> str:
    """`repo_id` below the token's user, unless it has a namespace."""
    if "/" in repo_id:
        return repo_id
    return f"{hub.patiently(hub.api.whoami)['name']}/{repo_id}"


def _within(seconds: float, call: Callable[P, R], /, *args: P.args, **settings: P.kwargs) -> R:
    """What a call returns, in a thread of its own: the client itself waits for ever.

    Raises:
        TimeoutError: it did not return in time, and is left to itself.
    """
    result: Future[R] = Future()

    def run() -> None:
        try:
            result.set_result(call(*args, **settings))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="preflight", daemon=True).start()
    return result.result(seconds)


def same_repository(one: str, other: str) -> bool:
    """Whether two ids may mean one repository; without a namespace one means any of its name."""
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def _writable(hub: Hub, repo_id: str, private: bool | None, taken: str | None) -> str:
    user = hub.patiently(hub.api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushRefused(
            [f"the token of {user['name']!r} is read-only: make one that can write at {_TOKENS}"]
        )
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    problems = name_problems("hub_model_id", repo_id)
    if taken is not None:
        taken = taken if "/" in taken else f"{user['name']}/{taken}"
        if taken == repo_id:
            problems.append(f"the trainer pushes to {taken}: choose another hub_model_id")
    if problems:
        raise PushRefused(problems)
    try:
        hub.patiently(hub.api.create_repo, repo_id, private=private, exist_ok=True)
        hub.patiently(hub.api.auth_check, repo_id, write=True)
    except HfHubHTTPError as error:
        if _status(error) not in (401, 403, 404):
            raise
        mine = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        raise PushRefused(  # which preflight tells without its cause
            [
                f"{repo_id} cannot be made or written with the token of {user['name']!r}, who is "
                f"in {plain(', '.join(mine))} ({_told(error)}): choose another hub_model_id, or "
                f"a token that can write there ({_TOKENS})"
            ]
        ) from error
    _look_around(hub, repo_id, private)
    return repo_id


def _look_around(hub: Hub, repo_id: str, private: bool | None) -> None:
    """Say what might surprise the owner of a repository that was there before."""
    info = hub.patiently(hub.api.model_info, repo_id)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if private and info.private is False:
        logger.warning("%s is public already; hub_private_repo does not change that", repo_id)
    if "merge_manifest.json" not in names and "config.json" in names:
        logger.warning(
            "%s holds a model that merge_callback did not write; the newest version will replace "
            "its files of the same names on the branch (git keeps them): choose another "
            "hub_model_id if it is not for this one",
            repo_id,
        )


def name_problems(option: str, repo_id: str) -> list[str]:
    """Why no repository can be called as an option says."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return [f"{option}: {error}"]
    if len(repo_id) > _LONGEST_ID:
        return [f"{option}: {repo_id!r} is longer than {_LONGEST_ID} characters"]
    return []


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The Hub's answer, if it was one that made the call fail."""
    for part in _chain(error):
        if isinstance(part, HfHubHTTPError):
            return int(part.response.status_code)
        if isinstance(part, ConnectionError):  # hf_xet has no other words for it
            answer = re.search(r"HTTP status \w+ error \((\d{3})", str(part))
            if answer is not None:
                return int(answer[1])
    return None


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later, with nothing changed."""
    status = _status(error)
    if status is not None:
        return status in _BUSY or status >= 500
    return not any(isinstance(part, _PERMANENT) for part in _chain(error))


def _asked_to_wait(error: Exception) -> float:
    """Seconds, from a Retry-After header."""
    for part in _chain(error):
        if isinstance(part, HfHubHTTPError):
            value: Any = part.response.headers.get("Retry-After", "")
            return float(value) if re.fullmatch("[0-9]+", value) else 0.0  # isdigit takes "²"
    return 0.0


def _told(error: BaseException) -> str:
    """What an error and its causes say, in one line."""
    said = dict.fromkeys(_line(part) for part in _chain(error))
    return plain(redacted(": ".join(said)))


def _line(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        _used.add(error.response.request.headers.get("Authorization", "").partition(" ")[2])
        answer = f"{error.response.status_code} {error.response.reason_phrase}"
        asked = f"{error.response.request.method} {error.response.request.url.path}"
        said = f" ({error.server_message[:_MOST_TOLD]})" if error.server_message else ""
        return f"{asked} was answered {answer}{said}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
