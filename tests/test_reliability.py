"""What goes wrong outside the lab: any text, broken files, kills, full disks, foreign models.

LAB04_KILLS=20 kills every lab that many times at random points (by default twice).
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import HEADLINES, ROOT, run_in_process
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab04 import LabError, artefact
from lab04.artefact import contract, sealing, tokeniser
from lab04.artefact.folder import building
from lab04.compare import consistency
from lab04.read import classifier
from lab04.run import runtimes, scores

BACKENDS = ["torch", "onnx", "tensorrt"]
LABS = {"torch": "lab04-torch.py", "onnx": "lab04-optimum.py", "tensorrt": "lab04-nvidia.py"}
PLACES = 50  # in every file
KILLS = int(os.environ.get("LAB04_KILLS", 2))


# --- Any text ---------------------------------------------------------------------------------------------

EXAMPLES, EACH = 100, 8  # 800 headlines
STRANGE = [
    *("", " ", " \t\n\r\u00a0\u2003", "\0", "a\0b", "\x01\x02\x1b[31m\x7f\x85", "\ufeffmarked"),
    *("\u202eright to left\u202c", "مرحبا بالعالم", "שלום עולם", "数字 한국어 ไทย", "e\u0301\u0327\u0308" * 50),
    *("🙂", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\ud800", "end \udfff", "\ud83d"),
    *("$", "$3tn … $1bn", "{bad$", "$\\frac{1}{2}$", "<b>&amp;</b>", "<script>alert(1)</script>"),
    *("[CLS] [SEP] [PAD] [MASK] [UNK]", "</s><s><pad>", "qzxj qzxjv xqzjk"),
]
LONG = ["A" * 100_000, "word " * 20_000, "🙂" * 25_000, "\ud800" * 30_000]  # once: tokenising them takes its time
TEXTS = st.one_of(
    st.sampled_from(STRANGE + [text[:5000] for text in LONG]),
    st.text(max_size=200),  # every plane of Unicode but surrogates
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs"]), max_size=60),
    st.builds(" ".join, st.lists(st.sampled_from(STRANGE + HEADLINES), max_size=6)),
)


@pytest.fixture(scope="module")
def runners(artefact_folder):
    """Tokeniser and backend of every artefact that runs on the CPU."""
    found = {}
    for name in BACKENDS:
        item = artefact.load(artefact_folder(name))
        opened = runtimes.open_fp16_check(item) if name == "tensorrt" else runtimes.open_backend(item)
        found[name] = (artefact.Tokeniser(item), opened)
    return found


def test_any_text_gets_probabilities(runners, model_folder, record_property):
    fp32 = classifier.load(str(model_folder("bert", 9)))
    agreed, count = Counter(), Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @example(LONG + HEADLINES + [""])
    @given(st.lists(TEXTS, min_size=EACH, max_size=EACH))
    def property_of_texts(texts):
        reference = scores.softmax(fp32.logits([tokeniser.clean(text) for text in texts]))
        best_two = np.sort(reference, axis=1)[:, -2:]
        decided = best_two[:, 1] - best_two[:, 0] >= consistency.DECIDED_MARGIN
        tokens = [[tokenise([text]) for text in texts] for tokenise, _ in runners.values()]
        for other in tokens[1:]:
            for one, two in zip(tokens[0], other, strict=True):
                assert one.keys() == two.keys()
                assert all((one[name] == two[name]).all() for name in one)
        for name, (tokenise, backend) in runners.items():
            single = np.concatenate([backend.logits(row) for row in tokens[0]])
            padded = backend.logits(tokenise(texts))
            for logits in (single, padded):
                probabilities = scores.softmax(logits)
                assert probabilities.shape == (EACH, 9)
                np.testing.assert_allclose(probabilities.sum(axis=1), 1)
            agreed[name] += int((single.argmax(1) == reference.argmax(1))[decided].sum())
        count["all"] += len(texts)
        count["decided"] += int(decided.sum())

    property_of_texts()
    assert count["all"] >= EXAMPLES * EACH
    for name in runners:
        record_property(f"{name} agreement with FP32", agreed[name] / count["decided"])
        print(f"{name}: same label as FP32 on {agreed[name]} of {count['decided']} decided texts of {count['all']}")
        assert agreed[name] / count["decided"] >= 0.95


def test_strange_headlines_are_reported_and_charted(artefact_folder, tmp_path, capsys):
    texts = [text for text in STRANGE if text.strip()]
    assert run_in_process("predict.py", "--artefacts", artefact_folder("onnx"), "--output", tmp_path, "--", *texts) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\nPredicting: ") == len(texts)
    assert captured.err == ""
    assert len(list(tmp_path.glob("confidence_*.png"))) == 20


# --- Broken artefacts -------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def copied(request, artefact_folder, tmp_path):
    """A copy of an artefact that may be broken."""
    return shutil.copytree(artefact_folder(request.param), tmp_path / "copy")


def test_one_changed_byte_is_refused(copied):
    for path in list(copied.iterdir()):
        whole = path.read_bytes()
        for place in places(len(whole)):
            broken = bytearray(whole)
            broken[place] ^= random.choice([1, 2, 4, 8, 16, 32, 64, 128])
            path.write_bytes(broken)
            with pytest.raises(LabError, match="corrupt artefact"):
                artefact.load(copied)
        path.write_bytes(whole)
    artefact.load(copied)


def test_truncated_file_is_refused(copied):
    for path in list(copied.iterdir()):
        whole = path.read_bytes()
        for place in places(len(whole)):
            path.write_bytes(whole[:place])
            with pytest.raises(LabError, match="corrupt artefact"):
                artefact.load(copied)
        path.unlink()
        with pytest.raises(LabError, match="missing artefact"):
            artefact.load(copied)
        path.write_bytes(whole)
    artefact.load(copied)


def places(size: int) -> list[int]:
    """First and last byte and random ones between."""
    return sorted({0, size - 1, *(random.randrange(size) for _ in range(PLACES - 2))})


def test_file_of_another_artefact_is_refused(copied, artefact_folder):
    manifest = artefact.load(copied).manifest
    other = artefact_folder({"onnxruntime": "onnx"}.get(manifest["backend"], manifest["backend"]), "bert", 9, 1)
    for name in manifest["files"]:
        mine, theirs = (copied / name).read_bytes(), (other / name).read_bytes()
        if mine != theirs:
            (copied / name).write_bytes(theirs)
            with pytest.raises(LabError, match="corrupt artefact"):
                artefact.load(copied)
            (copied / name).write_bytes(mine)


def test_artefacts_of_other_weights_or_labels_do_not_mix(artefact_folder):
    mine = artefact.load(artefact_folder("torch"))
    contract.check_together([mine, artefact.load(artefact_folder("onnx"))])
    for other in (artefact_folder("onnx", "bert", 9, 1), artefact_folder("onnx", "distilbert", 2)):
        with pytest.raises(LabError, match="come from different weights"):
            contract.check_together([mine, artefact.load(other)])


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/file", "."])
def test_manifest_cannot_leave_its_folder(name, copied):
    """Manifests that are whole and hashed, as somebody who means harm would write them."""
    (copied.parent / "outside").write_text("not ours")
    manifest = artefact.load(copied).manifest
    described = {"bytes": 8, "sha256": "0" * 64}
    with contextlib.suppress(OSError):
        described = contract.describe_file(copied / name)
    for change in (
        {"files": {**manifest["files"], name: described}},
        {"files": {**manifest["files"], name: described}, "model_file": name},
        {"model_file": name},
        {"graph": name},
    ):
        sealing.write_manifest(copied, {**manifest, **change})
        with pytest.raises(LabError, match="corrupt artefact"):
            artefact.load(copied)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "42", "{", '{"files": 3}', "\udcff", '{"format": 1}' + " " * 9]
)
def test_manifest_that_is_none(text, copied):
    (copied / "manifest.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(LabError, match="corrupt artefact"):
        artefact.load(copied)


# --- Builds that do not come to their end -----------------------------------------------------------------


@pytest.fixture
def build_in_fork(tmp_path_factory):
    """`build_in_fork(action)`: the id of a forked process, with torch and transformers imported, that runs `action`.

    What it leaves in the folder of temporary files when it is killed is cleared away with those of the tests.
    """
    scratch = tmp_path_factory.mktemp("scratch")

    def fork(action) -> int:
        process = os.fork()
        if not process:
            code = 70
            with contextlib.suppress(BaseException):
                tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                code = action() or 0
            os._exit(code)
        return process

    return fork


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_an_artefact_may_read_all_its_files(umask, mode, tmp_path):
    """safetensors writes files for their owner alone: a service under a user of its own could not open them."""
    before = os.umask(umask)
    try:
        with building(tmp_path / "built") as folder:
            (folder / "manifest.json").write_text("{}")
            os.close(os.open(folder / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "built").iterdir()} == {mode}


def copy_build(source: Path, output: Path, pause: float = 0) -> None:
    """Write an artefact's files as a lab does, but without computing them."""
    with building(output) as folder:
        for path in source.iterdir():
            shutil.copy(path, folder)
            time.sleep(pause)


def test_kill_at_every_file_operation_leaves_old_new_or_none(build_in_fork, artefact_folder, tmp_path):
    """The process kills itself before the first, second, third … operation on files, until a build comes through."""
    old, new = artefact_folder("onnx"), artefact_folder("onnx", "bert", 9, 1)
    versions = {artefact.load(folder).manifest["sha256"]: name for folder, name in ((old, "old"), (new, "new"))}
    output = tmp_path / "quantised-model-optimum"
    found = Counter()

    def killed(step: int):
        events = iter(range(step))

        def hook(event, _):
            about_files = event.split(".")[0] in ("open", "os", "shutil") and event != "os.kill"
            if about_files and next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        copy_build(new, output)

    for step in range(10_000):
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(old, output)
        _, status = os.waitpid(build_in_fork(lambda step=step: killed(step)), 0)
        try:
            found[versions[artefact.load(output).manifest["sha256"]]] += 1
        except LabError as error:
            assert "missing artefact" in str(error)
            found["none"] += 1
        if not os.WIFSIGNALED(status):
            break
    assert os.waitstatus_to_exitcode(status) == 0
    print(dict(found))
    assert found["old"] > 10
    assert found["none"] <= 3, "between stepping aside and stepping in there is little to do"
    copy_build(new, output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "what killed builds left is cleared"


@pytest.mark.parametrize("backend", LABS)
@pytest.mark.usefixtures("few_headlines")
def test_kill_at_random_points_leaves_a_whole_artefact_or_none(
    backend, build_in_fork, artefact_folder, model_folder, tmp_path
):
    output = shutil.copytree(artefact_folder(backend), tmp_path / "built")
    model = model_folder("bert", 9, 1)

    def build():
        return run_in_process(LABS[backend], "--model", model, "--output", output)

    seconds = -time.monotonic()
    os.waitpid(
        build_in_fork(lambda: run_in_process(LABS[backend], "--model", model, "--output", tmp_path / "other")), 0
    )
    seconds += time.monotonic()
    weights = {artefact.load(folder).manifest["weights_sha256"] for folder in (output, tmp_path / "other")}
    assert len(weights) == 2
    new = artefact.load(tmp_path / "other").manifest["weights_sha256"]
    shutil.rmtree(tmp_path / "other")
    for _ in range(KILLS):
        process = build_in_fork(build)
        time.sleep(random.uniform(0, 0.95 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with contextlib.suppress(FileNotFoundError):
            found = artefact.load(output)  # raises unless every file is what its manifest says
            assert found.manifest["weights_sha256"] in weights  # a kill may come just after the new one stepped in
    assert build() in (0, 3)
    assert artefact.load(output).manifest["weights_sha256"] == new
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


def test_two_builds_of_one_folder_at_once(build_in_fork, artefact_folder, tmp_path):
    sources = [artefact_folder("onnx"), artefact_folder("onnx", "bert", 9, 1), artefact_folder("torch")]
    versions = {artefact.load(folder).manifest["sha256"] for folder in sources}
    output = tmp_path / "built"
    for _ in range(10):
        processes = [
            build_in_fork(lambda s=source: copy_build(s, output, random.uniform(0, 0.003))) for source in sources
        ]
        for process in processes:
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert artefact.load(output).manifest["sha256"] in versions
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


@pytest.mark.usefixtures("few_headlines")
def test_two_labs_writing_one_folder_at_once(build_in_fork, model_folder, tmp_path):
    output = tmp_path / "built"
    processes = [
        build_in_fork(lambda s=script: run_in_process(s, "--model", model_folder("bert", 9), "--output", output))
        for script in ("lab04-torch.py", "lab04-optimum.py")
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    assert artefact.load(output).backend in ("torch", "onnxruntime")
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


@pytest.mark.parametrize("script", LABS.values())
@pytest.mark.parametrize("kilobytes", [4, 200])
@pytest.mark.usefixtures("few_headlines")
def test_full_disk_keeps_the_old_artefact(script, kilobytes, artefact_folder, model_folder, tmp_path, capfd):
    """A real file system with less room than the new artefact needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    old = artefact_folder("torch")
    size = sum(path.stat().st_size + 4096 for path in old.iterdir()) + 4096 + 1000 * kilobytes
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here; the next test needs no rights")
    try:
        shutil.copytree(old, disk / "built")
        before = artefact.load(disk / "built").manifest
        assert run_in_process(script, "--model", model_folder("bert", 9), "--output", disk / "built") == 2
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith(f"{script}: cannot write {disk / 'built'}: ")
        assert artefact.load(disk / "built").manifest == before
        assert [path.name for path in disk.iterdir()] == ["built"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("script", LABS.values())
@pytest.mark.usefixtures("few_headlines")
def test_file_that_may_not_grow_keeps_the_old_artefact(script, build_in_fork, artefact_folder, model_folder, tmp_path):
    """The limit on file sizes fails a write as a full disk does, and any user may set it."""
    output = shutil.copytree(artefact_folder("torch"), tmp_path / "built")
    before = artefact.load(output).manifest
    read_end, write_end = os.pipe()

    def build():
        os.dup2(write_end, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        code = run_in_process(script, "--model", model_folder("bert", 9), "--output", output)
        sys.stderr.flush()
        return code

    _, status = os.waitpid(build_in_fork(build), 0)
    os.close(write_end)
    with os.fdopen(read_end) as errors:
        [line] = errors.read().splitlines()
    assert line.startswith(f"{script}: cannot write {output}: ")
    assert os.waitstatus_to_exitcode(status) == 2
    assert artefact.load(output).manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


@pytest.mark.parametrize("script", LABS.values())
def test_interrupted_build_changes_nothing(script, build_in_fork, model_folder, tmp_path):
    pipes = {number: os.pipe() for number in (1, 2)}

    def build():
        for number, (_, write_end) in pipes.items():
            os.dup2(write_end, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        return run_in_process(script, "--model", model_folder("bert", 9), "--output", tmp_path / "built")

    process = build_in_fork(build)
    for _, write_end in pipes.values():
        os.close(write_end)
    with os.fdopen(pipes[1][0]) as lines, os.fdopen(pipes[2][0]) as errors:
        assert any(line.startswith("2. ") for line in lines)
        os.kill(process, signal.SIGINT)
        assert errors.read() == f"{script}: interrupted\n"
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", LABS.values())
def test_output_that_cannot_be_written_or_is_not_ours(script, model_folder, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "folder", Path("/proc/nowhere")):
        assert run_in_process(script, "--model", model_folder("bert", 9), "--output", output) == 2
        [line] = capfd.readouterr().err.splitlines()
        assert str(output) in line
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


# --- Models are data --------------------------------------------------------------------------------------


def test_pickled_weights_are_not_loaded(model_folder, tmp_path, capfd):
    import torch

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for family, weights in (("bert", "pytorch_model.bin"), ("adapter", "adapter_model.bin")):
        folder = shutil.copytree(model_folder(family, 9), tmp_path / family)
        (folder / weights.replace("pytorch_", "").replace(".bin", ".safetensors")).unlink()
        torch.save({"weight": Harmful()}, folder / weights)
        assert run_in_process("lab04-torch.py", "--model", folder, "--output", tmp_path / "built") == 2
        [line] = capfd.readouterr().err.splitlines()
        assert "safetensors" in line
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("model_type", ["bert", "unheard-of"])
@pytest.mark.usefixtures("few_headlines")
def test_code_in_a_model_folder_is_not_run(model_type, model_folder, tmp_path, capfd):
    folder = shutil.copytree(model_folder("bert", 9), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": classes}))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n")
    code = run_in_process("lab04-torch.py", "--model", folder, "--output", tmp_path / "built")
    assert code == 2
    assert not (tmp_path / "executed").exists()
    [line] = capfd.readouterr().err.splitlines()
    assert "auto_map" in line and not (tmp_path / "built").exists()


# --- Long runs --------------------------------------------------------------------------------------------

MEMORY_PROGRAM = """
import sys
import psutil
from lab04 import artefact
from lab04.run import runtimes
item = artefact.load(sys.argv[1])
tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
texts = [f"Headline number {n} " + "with words " * (n % 25) for n in range(1100)]
for done, text in enumerate(texts):
    if done == 100:  # every length has been seen: buffers have their size
        before = psutil.Process().memory_info().rss
    backend.logits(tokenise([text]))
print(before, psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_memory_is_flat_over_a_thousand_predictions(backend, artefact_folder):
    folder = artefact_folder(backend, "minilm", 100)
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    print(f"{backend}: {before / 1e6:.1f} MB after 100 predictions, {after / 1e6:.1f} MB after 1,100")
    assert after < 1.05 * before
