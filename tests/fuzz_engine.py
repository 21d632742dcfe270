"""A mutation fuzzer for readers of files: every mutant is refused in one sentence, or read as something that is right.

Mutants are read in forked processes with a limit of time and memory, in which an audit hook watches what is executed and where
files are written. Beside the folder of a mutant lie a folder that it must not reach and a marker that only an attack makes.
"""

import json
import logging
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.errors import CommandError, UserError
from tests.fuzz_bytes import Source
from tests.fuzz_mutations import MUTATIONS, Mutation

REPOSITORY = Path(__file__).resolve().parent.parent
REFUSED, EQUAL, VALID = "refused", "loaded equal", "loaded otherwise but valid"
FINE = (REFUSED, EQUAL, VALID)
_LONGEST_SENTENCE = 2000
_BATCH = 200  # mutants that one process reads
_PACKAGES = ("binarize", "common", "datasets", "models", "quantize", "scripts", "utils")
_EXECUTION = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "pickle.find_class",
)
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
_QUIET = (ResourceWarning, DeprecationWarning, PendingDeprecationWarning, ImportWarning)  # users do not see them


# places of paths, and of the folders that they start from, among the arguments of an audit event
_PLACES = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),),
    "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),), "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A place where the program reads a file.

    Attributes:
        make: (folder, variant 0 or 1) -> a valid file in the folder, with all that lies around it.
        read: the file -> what the program gets from it, through the function that a script calls.
        form: which mutations beyond those of bytes, see `MUTATIONS`.
        sealed: a hash or the like tells every change: what is read must be the same as before.
        check: (what was read, what the valid file gives) -> AssertionError if no valid file could give that.
        same: whether two things that were read are equal.
        refusals: the errors that may be raised.
        names: of what a sentence may speak, instead of the file's own name.
        may_leave: the file may name files anywhere, as a list written by the user.
        programs: what may be started, as the compiler.
        chatty: a C library may tell stderr, in readable text, what it does not like.
    """

    name: str
    make: Callable[[Path, int], Path]
    read: Callable[[Path], object]
    form: str
    sealed: bool = False
    check: Callable[[object, object], None] = lambda value, original: None
    same: Callable[[object, object], bool] = lambda value, original: equal(value, original)
    refusals: tuple[type[CommandError], ...] = (UserError,)
    names: tuple[str, ...] = ()
    may_leave: bool = False
    programs: tuple[str, ...] = ()
    chatty: bool = False


@dataclass(frozen=True)
class Limits:
    """Of one mutant: CPU seconds, megabytes beyond those that the process has anyway, and seconds that it may do nothing."""

    seconds: float = 10.0
    megabytes: int = 768
    patience: float = 120.0


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: one of `FINE` or the kind of failure; `detail` and `place` tell more of a failure."""

    index: int
    mutation: str
    outcome: str
    detail: str = ""
    place: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Summary:
    """All verdicts of a reader."""

    reader: str
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome not in FINE]

    def groups(self) -> dict[tuple[str, str, str], list[Verdict]]:
        """Failures of the same kind at the same place, without what varies between them."""
        found: dict[tuple[str, str, str], list[Verdict]] = {}
        for verdict in self.failures:
            found.setdefault((verdict.outcome, verdict.detail.split(":")[0][:80], verdict.place), []).append(verdict)
        return found

    def describe(self) -> str:
        """A line for each group of failures, with the mutants to look at."""
        lines = []
        for (outcome, _, place), same in sorted(self.groups().items(), key=lambda entry: -len(entry[1])):
            mutants = ", ".join(f"{verdict.index} ({verdict.mutation})" for verdict in same[:4])
            lines.append(f"{self.reader}: {len(same)}x {outcome} at {place or '?'}: {same[0].detail[:300]} [mutants {mutants}]")
        return "\n".join(lines)

    def row(self) -> tuple[str, ...]:
        """Cells of the table."""
        counts = Counter(verdict.outcome for verdict in self.verdicts)
        numbers = (len(self.verdicts), *(counts[outcome] for outcome in FINE), len(self.failures))
        return (self.reader, *map(str, numbers), f"{self.seconds:.1f}")


def equal(one: object, other: object) -> bool:
    """Whether two nested values are the same, in arrays and tensors to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and equal(one.detach().contiguous().numpy(), other.detach().contiguous().numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)
    return one == other


class Workspace:
    """The folders of a reader: `inside`, where its file lies and where it may write, and `outside`, which it must not reach."""

    def __init__(self, reader: Reader, folder: Path):
        self.folder = folder.resolve()
        self.inside, self.outside = self.folder / "inside", self.folder / "outside"
        self.marker = self.folder / "marker"
        others = self.folder / "other"
        for path in (self.inside, self.outside, others):
            path.mkdir(parents=True)
        self.target, self.other = reader.make(self.inside, 0), reader.make(others, 1)
        (self.outside / f"secret{self.target.suffix}").write_bytes(self.target.read_bytes())
        self.source = Source(
            content=self.target.read_bytes(),
            other=self.other.read_bytes(),
            marker=self.marker,
            outside=self.outside / f"secret{self.target.suffix}",
        )

    def put(self, content: bytes) -> None:
        """Replace the file, by a new one: an old one may still be mapped."""
        temporary = self.folder / "next"
        temporary.write_bytes(content)
        os.replace(temporary, self.target)

    def read(self, reader: Reader) -> object:
        """What the valid file gives, which is put back afterwards."""
        try:
            return reader.read(self.target)
        finally:
            self.put(self.source.content)


def mutant(reader: Reader, source: Source, seed: int, index: int) -> tuple[Mutation, bytes]:
    """The mutant of a number: nothing but reader, seed and number determines it."""
    mutations = MUTATIONS[reader.form]
    generator = random.Random(f"{reader.name}/{seed}/{index}")
    mutation = mutations[index % len(mutations)]
    content = mutation.change(source, generator)
    for _ in range(8):
        if content not in (source.content, source.other):
            break
        content = mutation.change(source, generator)
    return mutation, content


def fuzz(
    reader: Reader,
    folder: Path,
    count: int,
    seed: int = 0,
    limits: Limits = Limits(),
    start: int = 0,
    until: float | None = None,
) -> Summary:
    """Read mutants number `start` to `start + count`; none is begun after `until` (of time.monotonic)."""
    began = time.monotonic()
    space = Workspace(reader, folder)
    original = space.read(reader)
    if not reader.same(space.read(reader), original):
        raise ValueError(
            f"{reader.name}: reading the valid file twice gives two results, so that nothing can be compared with it"
        )
    verdicts: list[Verdict] = []
    try:
        if not reader.sealed:
            reader.check(reader.read(space.other), original)
    except AssertionError as error:
        fault = Verdict(-1, "none, the other valid file", "silent wrong result", f"{type(error).__name__}: {error}")
        return Summary(reader.name, [fault], time.monotonic() - began)
    index, end = start, start + count
    while index < end and (until is None or time.monotonic() < until):
        verdicts += _in_child(reader, space, original, seed, range(index, min(end, index + _BATCH)), limits)
        index = start + len(verdicts)
    return Summary(reader.name, verdicts, time.monotonic() - began)


def _in_child(
    reader: Reader, space: Workspace, original: object, seed: int, indices: range, limits: Limits
) -> Iterator[Verdict]:
    """Verdicts of some mutants from a process of their own; it may end early, with a failure as its last verdict."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(receiving)
            _Child(reader, space, original, limits).judge(seed, indices, sending)
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as stream:
        index, pending = indices.start, b""
        while index < indices.stop:
            if not select.select([stream], [], [], limits.patience)[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                yield _ended(reader, space, seed, index, "hangs", f"nothing for {limits.patience:g} s")
                return
            received = os.read(stream.fileno(), 65536)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                yield Verdict(**json.loads(line))
                index += 1
    _, status = os.waitpid(child, 0)
    if index < indices.stop:
        number = os.waitstatus_to_exitcode(status)
        kind = "takes too long" if number == -signal.SIGPROF else "process ended"
        detail = f"more than {limits.seconds:g} s of CPU time" if number == -signal.SIGPROF else f"exit status {number}"
        yield _ended(reader, space, seed, index, kind, detail)


def _ended(reader: Reader, space: Workspace, seed: int, index: int, kind: str, detail: str) -> Verdict:
    mutation, _ = mutant(reader, space.source, seed, index)
    return Verdict(index, mutation.name, kind, detail)


class _Child:
    """A forked process that reads mutants one after the other."""

    def __init__(self, reader: Reader, space: Workspace, original: object, limits: Limits):
        self.reader, self.space, self.original, self.limits = reader, space, original, limits
        self.watching, self.seen = False, []
        self.records: list[logging.LogRecord] = []

    def judge(self, seed: int, indices: range, stream: int) -> None:
        """Write a line for each mutant."""
        self._prepare()
        for index in indices:
            mutation, content = mutant(self.reader, self.space.source, seed, index)
            self.space.put(content)
            signal.setitimer(signal.ITIMER_PROF, self.limits.seconds)  # ends the process, in whatever library it is
            verdict = self._verdict(index, mutation)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(stream, json.dumps(vars(verdict)).encode() + b"\n")

    def _prepare(self) -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        torch.set_num_threads(1)
        sys.dont_write_bytecode = True
        self.printed = os.open(self.space.folder / "printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for number in (1, 2):
            os.dup2(self.printed, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        root = logging.getLogger()
        root.handlers = [_Collector(self.records)]
        root.setLevel(logging.WARNING)
        logging.raiseExceptions = False
        sys.addaudithook(self._audit)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + self.limits.megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name in self.reader.programs:
            return
        if event in _EXECUTION:
            self.seen.append(("execution", f"{event} {str(arguments)[:200]}"))
        elif event in _NETWORK:
            self.seen.append(("network", f"{event} {str(arguments)[:200]}"))
        elif event == "open":
            self._audit_open(*arguments)
        for path, folder in _PLACES.get(event, ()):
            self._audit_change(event, _absolute(arguments[path], -1 if folder is None else arguments[folder]))

    def _audit_open(self, path: object, mode: str | None, flags: int) -> None:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) or set(mode or "") & set("wax+")
        if writes:
            self._audit_change("open for writing", path)
        elif self._lies_below(path, self.space.outside) and not self.reader.may_leave:
            self.seen.append(("reads outside", f"open {path!r}"))

    def _audit_change(self, event: str, path: object) -> None:
        if path != os.devnull and not self._lies_below(path, self.space.inside):
            self.seen.append(("writes outside", f"{event} {path!r}"))

    def _lies_below(self, path: object, folder: Path) -> bool:
        if isinstance(path, int):  # opened before
            return folder == self.space.inside
        name = os.path.realpath(os.fsdecode(path))
        return name == str(folder) or name.startswith(f"{folder}{os.sep}")

    def _verdict(self, index: int, mutation: Mutation) -> Verdict:
        self.seen.clear()
        self.records.clear()
        os.ftruncate(self.printed, 0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as `datasets.images` has it
            for category in _QUIET:
                warnings.simplefilter("ignore", category)
            self.watching = True
            try:
                outcome, detail, error = self._read(mutation)
            finally:
                self.watching = False
        found = self._attack() or (outcome in FINE and self._side_effects(warned))
        outcome, detail = found or (outcome, detail)
        place, trace = (
            ("", "") if error is None or outcome in FINE else (_place(error), "".join(traceback.format_exception(error)))
        )
        return Verdict(index, mutation.name, outcome, detail, place, trace[-6000:])

    def _read(self, mutation: Mutation) -> tuple[str, str, BaseException | None]:
        try:
            value = self.reader.read(self.space.target)
        except self.reader.refusals as error:
            fault = self._fault_of_sentence(str(error))
            return ("bad sentence", fault, error) if fault else (REFUSED, str(error), error)
        except MemoryError as error:
            return "takes too much memory", f"more than {self.limits.megabytes} MB", error
        except BaseException as error:
            return "unexpected exception", f"{type(error).__name__}: {str(error)[:400]}", error
        try:
            if self.reader.same(value, self.original):
                return EQUAL, "", None
            if self.reader.sealed and not mutation.forged:
                return "silent wrong result", f"a change was not noticed: {_brief(value)}", None
            self.reader.check(value, self.original)
        except Exception as error:
            return "silent wrong result", f"{type(error).__name__}: {str(error)[:400] or _brief(value)}", error
        return VALID, "", None

    def _fault_of_sentence(self, sentence: str) -> str:
        if not sentence.isprintable():
            return f"several lines or characters that cannot be printed: {sentence[:400]!r}"
        if len(sentence) > _LONGEST_SENTENCE:
            return f"{len(sentence)} characters: {sentence[:400]!r}"
        if not any(name in sentence for name in (self.space.target.name, *self.reader.names)):
            return f"does not name the file: {sentence[:400]!r}"
        return ""

    def _attack(self) -> tuple[str, str] | None:
        if self.seen:
            return self.seen[0]
        if self.space.marker.exists():
            self.space.marker.unlink()
            return "execution", "the marker was made"
        strangers = {path.name for path in self.space.folder.iterdir()} - {"inside", "other", "outside", "printed"}
        return ("writes outside", str(strangers)) if strangers else None

    def _side_effects(self, warned: list) -> tuple[str, str] | None:
        if warned:
            return "warning of a library", f"{warned[0].category.__name__}: {warned[0].message}"
        for record in self.records:
            if record.name.split(".")[0] not in _PACKAGES:
                return "message of a library", f"{record.name}: {record.getMessage()[:300]}"
            if not record.getMessage().isprintable():
                return "bad log line", f"{record.name}: {record.getMessage()[:300]!r}"
        printed = os.pread(self.printed, 3000, 0)
        if printed and not (self.reader.chatty and printed.isascii() and printed.decode().replace("\n", "").isprintable()):
            return "printed by a library", repr(printed[:300])
        return None


class _Collector(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]):
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _absolute(path: object, folder: int) -> object:
    """A path that may start at an open folder."""
    if isinstance(path, int) or folder < 0:
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))


def _brief(value: object) -> str:
    return repr(value)[:300]


def _place(error: BaseException) -> str:
    """The last line of the program, not of a library or a test, that an exception came through."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in _PACKAGES:
            found = f"{path.relative_to(REPOSITORY)}:{frame.lineno} {frame.name}"
    return found
