"""The kernel cache: what other processes, crashes and other users can do to it; and its clients."""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from graphc.errors import CacheError, CompileError
from graphc.runtime import build
from graphc.runtime import cache as cache_module
from graphc.runtime.cache import Entry, KernelCache, default_cache, default_folder
from graphc.runtime.linker import KernelSource, LinkedCode, link, load_kernels

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX ownership")


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels")


def start(script: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 60) -> str:
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output


def increment(name: str, amount: int) -> KernelSource:
    """A kernel that adds to its first argument word; `amount` makes it unlike any other."""
    source = f"def {name}(arguments, thread, threads):\n    arguments[thread] += {amount}\n"
    return KernelSource(name, source)


def job_of(source: KernelSource, cache: KernelCache) -> build.Job:
    key = cache.key(source.source, source.signature, source.name)
    return build.Job(key, source.name, source.source, source.signature)


# ---- entries


def test_what_is_put_is_got(cache: KernelCache) -> None:
    key = cache.key("def f(): ...")
    assert cache.get(key) is None
    cache.put(key, "def f(): ...", "symbol", b"\x7fELF code")
    assert cache.get(key) == Entry("symbol", b"\x7fELF code")
    assert Path(cache.source_path(key)).read_text() == "def f(): ..."
    assert cache.size() > 0
    cache.clear()
    assert cache.get(key) is None and cache.size() == 0


def test_key_depends_on_all_that_shapes_the_code(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {cache.key("a"), cache.key("b"), cache.key("a", "void(int64)"), cache.key("a", name="f")}
    monkeypatch.setenv("GRAPHC_LANES", "4")
    keys.add(cache.key("a"))
    assert len(keys) == 5
    monkeypatch.delenv("GRAPHC_LANES")
    assert cache.key("a") in keys
    other = finish(
        start("from graphc.runtime.cache import KernelCache; print(KernelCache().key('a'))")
    )
    assert other.strip() == cache.key("a")


@pytest.mark.parametrize("length", [0, 5, 40, 60, 80, -1])
def test_truncated_entry_is_absent(
    cache: KernelCache, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    key = cache.key("f")
    cache.put(key, "f", "symbol", b"payload" * 10)
    path = cache.folder / f"{key}.obj"
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING, "graphc.cache"):
        assert cache.get(key) is None
    assert "damaged" in caplog.text
    cache.put(key, "f", "symbol", b"payload" * 10)
    assert cache.get(key) is not None


def test_every_flipped_bit_is_noticed(cache: KernelCache) -> None:
    key = cache.key("f")
    cache.put(key, "f", "symbol", b"payload")
    path = cache.folder / f"{key}.obj"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert cache.get(key) is None, position
    path.write_bytes(whole + b"x")
    assert cache.get(key) is None


def test_entry_of_another_kernel_is_absent(cache: KernelCache) -> None:
    cache.put(cache.key("f"), "f", "symbol", b"code of f")
    other = cache.key("g")
    (cache.folder / f"{cache.key('f')}.obj").rename(cache.folder / f"{other}.obj")
    assert cache.get(other) is None


def test_foreign_files_are_left_alone(cache: KernelCache) -> None:
    (cache.folder / "notes.py").write_text("mine")
    cache.put(cache.key("f"), "f", "symbol", b"code")
    cache.clear()
    assert [path.name for path in cache.folder.iterdir()] == ["notes.py"]


# ---- many processes

WRITER = """
    import random, sys
    from graphc.runtime.cache import KernelCache
    cache, seed = KernelCache(sys.argv[1]), int(sys.argv[2])
    print("ready", flush=True)
    chance = random.Random(seed)
    for turn in range(int(sys.argv[3])):
        number = chance.randrange(20)
        key = f"{number:064x}"
        payload = bytes([number]) * (1000 + 5000 * number)
        entry = cache.get(key)
        assert entry is None or entry == (f"symbol{number}", payload), key
        cache.put(key, f"source {number}", f"symbol{number}", payload)
        if turn % 40 == 39:
            cache.prune()
    """


def test_eight_processes_fill_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    writers = [start(WRITER, folder, seed, 200, GRAPHC_CACHE_MAX_MB="0.6") for seed in range(8)]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8
    assert not any("damaged" in text for text in errors)
    assert not list(folder.glob("*.tmp"))


@posix
def test_process_killed_in_the_middle_of_a_put(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    for seed in range(4):
        writer = start(WRITER, folder, seed, 10**6)
        writer.stdout.readline()
        time.sleep(0.03 + 0.01 * seed)
        writer.kill()
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
    finish(start(WRITER, folder, 99, 100))
    cache = KernelCache(folder)
    assert all(cache.get(path.stem) for path in folder.glob("*.obj"))
    # What a killed process was writing goes once it is certain that nobody writes it any more.
    leftover = folder / "write-killed.tmp"
    leftover.write_bytes(b"half")
    cache.prune()
    assert leftover.exists()
    os.utime(leftover, (0, 0))
    cache.prune()
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other key"])
def test_notes_are_kept_unless_damaged(
    cache: KernelCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, other = cache.key("first"), cache.key("second")
    assert cache.get_note(key) is None and not caplog.records
    document = {"tile": [["i0", 4], ["i1", 3]], "microseconds": 1.5}
    cache.put_note(key, document)
    assert cache.get_note(key) == document and cache.size() > 0
    path = cache.folder / f"{key}.note"
    data = path.read_bytes()
    if damage == "other key":
        path.rename(cache.folder / f"{other}.note")
        key = other
    else:
        path.write_bytes(
            {"flipped": data.replace(b"3", b"5"), "cut": data[:-1], "empty": b""}[damage]
        )
    assert cache.get_note(key) is None and "damaged" in caplog.text
    cache.clear()
    assert cache.size() == 0


# ---- trust and places


@posix
def test_folder_is_private(cache: KernelCache) -> None:
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(mode)
    link_to_it = tmp_path / "link"
    link_to_it.symlink_to(folder)
    for path in (folder, link_to_it):
        with pytest.raises(CacheError, match=f"chmod 700 {folder}") as caught:
            KernelCache(path)
        assert "\n" not in str(caught.value) and "GRAPHC_CACHE_DIR" in str(caught.value)
    folder.chmod(0o700)
    assert KernelCache(link_to_it).folder == link_to_it


@posix
def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir(mode=0o700)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(CacheError, match=f"belongs to user id {user}"):
        KernelCache(tmp_path / "kernels")


@posix
def test_file_that_others_may_write_is_refused(cache: KernelCache) -> None:
    key = cache.key("f")
    cache.put(key, "f", "symbol", b"code")
    (cache.folder / f"{key}.obj").chmod(0o666)
    with pytest.raises(CacheError, match="chmod 600"):
        cache.get(key)


@posix
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_regular_file_is_absent(cache: KernelCache, kind: str) -> None:
    key = cache.key("f")
    cache.put(key, "f", "symbol", b"code")
    path = cache.folder / f"{key}.obj"
    data = path.read_bytes()
    path.unlink()
    if kind == "link":
        (cache.folder / "elsewhere").write_bytes(data)
        path.symlink_to(cache.folder / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir(mode=0o700)
    assert cache.get(key) is None


@posix
def test_without_a_usable_home_one_warning_and_no_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "_warned", set())
    for name in ("GRAPHC_CACHE_DIR", "XDG_CACHE_HOME", "GRAPHC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")  # no user, not even root, can write there
    with caplog.at_level(logging.WARNING, "graphc.cache"):
        for _ in range(2):
            cache = KernelCache()
            cache.put(cache.key("f"), "f", "symbol", b"code")
            assert cache.folder is None and cache.get(cache.key("f")) is None
    assert len(caplog.records) == 1 and "GRAPHC_CACHE_DIR" in caplog.text
    loaded = load_kernels([increment("homeless", 101)], cache)
    assert loaded.addresses[0]


def test_full_disk_is_one_warning(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "replace", no_space)
    with caplog.at_level(logging.WARNING, "graphc.cache"):
        for text in ("f", "g"):
            cache.put(cache.key(text), text, "symbol", b"code")
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert not list(cache.folder.iterdir())


def test_environment_chooses_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "chosen"))
    assert default_folder() == tmp_path / "chosen" and default_cache().folder == default_folder()
    monkeypatch.setenv("GRAPHC_CACHE", "0")
    assert default_cache().folder is None and default_cache().size() == 0
    monkeypatch.delenv("GRAPHC_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/graphc")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder().parts[-3:] == ("Library", "Caches", "graphc")


def test_least_recently_used_go_first(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{number:064x}" for number in range(10)]
    for number, key in enumerate(keys):
        cache.put(key, "source", "symbol", b"x" * 100_000)
        for path in cache.folder.glob(f"{key}.*"):
            os.utime(path, (1000 + number, 1000 + number))
    assert cache.get(keys[0]) is not None  # used: now the youngest
    monkeypatch.setenv("GRAPHC_CACHE_MAX_MB", "0.5")
    cache.prune()
    left = {path.stem for path in cache.folder.glob("*.obj")}
    assert left == {keys[0], *keys[-3:]} == {path.stem for path in cache.folder.glob("*.py")}
    for number in range(10, 40):
        cache.put(f"{number:064x}", "source", "symbol", b"x" * 100_000)
    assert cache.size() < 0.6 * (1 << 20)
    monkeypatch.setenv("GRAPHC_CACHE_MAX_MB", "many")
    with pytest.raises(CacheError, match="GRAPHC_CACHE_MAX_MB='many'"):
        cache.prune()


# ---- compiling and linking


def test_load_compiles_once(cache: KernelCache) -> None:
    sources = [increment("first", 201), increment("second", 202), increment("first", 201)]
    seen: list[tuple[int, int, str]] = []
    loaded = load_kernels(
        sources, cache, lambda done, total, seconds, name: seen.append((done, total, name))
    )
    assert {"first", "second"} <= set(loaded.compiled)
    assert loaded.addresses[0] == loaded.addresses[2] != loaded.addresses[1]
    assert loaded.address("second") == loaded.addresses[1]
    assert [done for done, _, _ in seen] == list(range(1, len(loaded.compiled) + 1))
    assert Path(loaded.paths[0]).read_text() == sources[0].source
    again = load_kernels(sources, cache)
    assert again.addresses == loaded.addresses and not again.compiled


def test_warm_process_does_not_import_numba(cache: KernelCache) -> None:
    script = """
        import sys
        from graphc.runtime.cache import KernelCache
        from graphc.runtime.linker import KernelSource, load_kernels
        from graphc.runtime.team import get_team
        source = "def warm(arguments, thread, threads):\\n    arguments[0] += 1\\n"
        loaded = load_kernels([KernelSource("warm", source)], KernelCache(sys.argv[1]))
        get_team(2)
        print(len(loaded.compiled), "numba" in sys.modules)
        """
    environment = {"GRAPHC_CACHE_DIR": str(cache.folder)}
    assert finish(start(script, cache.folder, **environment)).split() == ["3", "True"]
    assert finish(start(script, cache.folder, **environment)).split() == ["0", "False"]


def test_compile_error_names_kernel_and_file(cache: KernelCache) -> None:
    source = "def broken(arguments, thread, threads):\n    arguments[0] = 'text' + 1\n"
    with pytest.raises(CompileError, match="kernel broken") as caught:
        load_kernels([KernelSource("broken", source)], cache)
    (path,) = (word.strip("()") for word in str(caught.value).split() if word.endswith(".py)"))
    assert Path(path).read_text() == source


def test_kernel_that_needs_numba_at_run_time_is_refused(cache: KernelCache) -> None:
    source = (
        "import numpy as np\n"
        "def allocates(arguments, thread, threads):\n"
        "    arguments[0] = np.zeros(arguments[1])[arguments[2]]\n"
    )
    with pytest.raises(CompileError, match="allocates .* NRT_"):
        load_kernels([KernelSource("allocates", source)], cache)


def test_worker_processes_compile_along(cache: KernelCache) -> None:
    sources = [increment(f"along{number}", 300 + number) for number in range(20)]
    # Slow enough that the worker has imported Numba before all are done.
    sources += [
        KernelSource(
            f"slow{number}",
            f"def slow{number}(a, thread, threads):\n"
            + "".join(f"    a[{line}] += a[{line + 1}] * {number}\n" for line in range(100)),
        )
        for number in range(4)
    ]
    seen: list[str] = []
    loaded = load_kernels(sources, cache, lambda *event: seen.append(event[3]), workers=1)
    assert len(set(loaded.addresses)) == len(sources)
    assert sorted(seen) == sorted(loaded.compiled)
    assert all(cache.get(key) for key in loaded.keys)


def test_worker_that_dies_costs_nothing(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is ready, takes a kernel, and is gone."""

    def start_and_die(folder: str) -> "subprocess.Popen[bytes]":
        script = "import sys; print('ready', flush=True); sys.stdin.readline()"
        command = [sys.executable, "-S", "-c", script]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(build, "_start_process", start_and_die)
    sources = [increment(f"orphan{number}", 400 + number) for number in range(20)]
    loaded = load_kernels(sources, cache, workers=2)
    assert len(set(loaded.addresses)) == 20


def test_worker_protocol(cache: KernelCache) -> None:
    """What `graphc/runtime/worker.py` says, whatever the kernels print or fail with."""
    process = build._start_process(str(cache.folder))
    assert process.stdout.readline() == b"ready\n"
    good = "print('noise')\n" + increment("good", 501).source
    for number, source in enumerate((good, "def good(:\n", good)):
        job = build.Job(f"{number:064x}", "good", source, cache_module.KERNEL_SIGNATURE)
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == (b"failed\n" if number == 1 else b"stored\n")
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()
    # Two processes, or two compilations, never give one name to different code.
    assert cache.get(f"{0:064x}").symbol != cache.get(f"{2:064x}").symbol


def test_workers_without_a_disk_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHC_CACHE", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    sources = [increment(f"diskless{number}", 600 + number) for number in range(8)]
    loaded = load_kernels(sources, workers=1)
    assert len(set(loaded.addresses)) == 8 and not list(tmp_path.iterdir())


def test_equal_symbols_are_not_linked_together(cache: KernelCache) -> None:
    load_kernels([increment("linked", 701)], cache)
    entry = cache.get(cache.key(increment("linked", 701).source, name="linked"))
    code = link([entry])
    assert isinstance(code, LinkedCode) and code.address(entry.symbol)
    with pytest.raises(Exception, match="same symbol"):
        link([entry, entry])
    with pytest.raises(Exception, match="does not define"):
        code.address("nothing")


def test_script_without_main_guard(tmp_path: Path) -> None:
    """Worker processes must not run the user's script again."""
    script = """
        print("once")
        from graphc.runtime.linker import KernelSource, load_kernels
        text = "def f{0}(a, thread, threads):\\n    a[0] += {0}\\n"
        sources = [KernelSource(f"f{number}", text.format(number)) for number in range(8)]
        assert len(set(load_kernels(sources, workers=1).addresses)) == 8
        """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAPHC_CACHE_DIR": str(tmp_path / "c")}
    for command, text in (([str(path)], None), (["-"], path.read_text())):
        done = subprocess.run(
            [sys.executable, *command],
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == "once\n"


def test_compiling_starts_before_the_kernels_are_known(cache: KernelCache) -> None:
    """The process that compiles the driver meanwhile is the one that compiles kernels then."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: str) -> "subprocess.Popen[bytes]":
        started.append(start_process(folder))
        return started[-1]

    start_process = build._start_process
    early = [job_of(increment(f"early{number}", 800 + number), cache) for number in range(2)]
    later = [job_of(increment(f"later{number}", 810 + number), cache) for number in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHC_COMPILE_WORKERS", "1")
        patch.setattr(build, "_start_process", start)
        build.start_early(early, cache)
        build.start_early(early, cache)
        assert len(started) == 1
        entries = build.compile_jobs([early[0], *later], cache, workers=1)
    assert set(entries) == {job.key for job in (early[0], *later)}
    assert len(started) == 1 and started[0].poll() is not None and build._early is None


def test_early_process_of_another_cache_is_ended(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHC_COMPILE_WORKERS", "1")
    other = KernelCache(tmp_path / "other")
    build.start_early([job_of(increment("elsewhere", 830), other)], other)
    jobs = [job_of(increment(f"here{number}", 831 + number), cache) for number in range(2)]
    assert len(build.compile_jobs(jobs, cache)) == 2 and build._early is None
