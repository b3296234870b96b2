import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tailseg.errors import UserError
from tailseg.zoo.checkpoint_files import LEGACY_MAGIC, read_checkpoint
from tailseg.zoo.pickle_values import Foreign

FORMATS = ("zip", "legacy", "pickle")
TORCH_FORMATS = ("zip", "legacy")


def save(content: Any, path: Path, kind: str) -> Path:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def wrap(program: bytes, kind: str, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """A file of any format around a pickle written by hand; ``storages`` are float32."""
    storages = storages or {}
    if kind == "pickle":
        return program
    if kind == "legacy":
        system = {"protocol_version": 1001, "little_endian": options.get("order", b"little") == b"little"}
        head = [b"\x80\x02" + LEGACY_MAGIC, pickle.dumps(1001, 2), pickle.dumps(system, 2), program]
        counts = options.get("counts", {})
        raw = b"".join(struct.pack("<q", counts.get(key, len(v) // 4)) + v for key, v in sorted(storages.items()))
        return b"".join(head) + pickle.dumps(sorted(storages), 2) + raw
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", options.get("order", b"little"))
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", value)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def call(name: str, *args: Any) -> bytes:
    """The body of a pickle that calls what has this name."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + body(args) + b"R"


def body(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor_program(
    *, key: Any = "0", numel: Any = 4, offset: Any = 0, size: Any = (4,), stride: Any = (1,), kind: str = "zip"
) -> bytes:
    """A dict of one foreign object (so that torch itself refuses it) and one tensor, as torch.save writes them."""
    view = b"" if kind == "zip" else body(None)
    storage = b"(" + body("storage") + b"ctorch\nFloatStorage\n" + body(key) + body("cpu") + body(numel) + view + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    tail = body(offset) + body(size) + body(stride) + b"\x89" + call("collections.OrderedDict") + b"tR"
    return b"\x80\x02}(" + body("f") + b"cabsent.things\nThing\n)\x81" + body("t") + rebuild + storage + tail + b"u."


def same(ours: Any, theirs: Any) -> None:
    """Equal in value and type, tensors also in dtype and strides; ours has only plain containers."""
    if isinstance(theirs, Tensor):
        assert type(ours) is Tensor
        assert not ours.requires_grad
        assert (ours.dtype, ours.shape, ours.device.type) == (theirs.dtype, theirs.shape, "cpu")
        assert ours.numel() == 0 or ours.stride() == theirs.stride()
        raw, expected = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (ours, theirs))
        assert torch.equal(raw, expected)
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is (list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@pytest.fixture
def foreign() -> Iterator[types.ModuleType]:
    """A module that has gone by the time its objects are read; `gone` removes it."""
    module = types.ModuleType("throwaway.things")
    sys.modules["throwaway"] = types.ModuleType("throwaway")
    sys.modules["throwaway.things"] = module
    code = """
class Buffer:
    def __init__(self, *values): self.values = list(values)
    def mean(self): return 0
class Slotted:
    __slots__ = ("a",)
    def __init__(self, a=0): self.a = a
class Config(dict): pass
class Items(list): pass
class Made:
    def __reduce__(self): return (Made, (1, 2), {"x": 1}, iter([1, 2]), iter([("k", 3)]))
class WithKeywords:
    def __new__(cls, *, a): return object.__new__(cls)
    def __getnewargs_ex__(self): return ((), {"a": 1})
class Outer:
    class _Inner: pass
def function(*args): open(args[0], "w").close()
"""
    exec(code, vars(module))
    for value in list(vars(module).values()):
        if hasattr(value, "__qualname__"):
            value.__module__ = module.__name__
    yield module
    sys.modules.pop("throwaway", None)
    sys.modules.pop("throwaway.things", None)


def gone() -> None:
    del sys.modules["throwaway"], sys.modules["throwaway.things"]


def many_tensors(kind: str = "zip") -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    whole = torch.arange(24)
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "an attribute"  # type: ignore[attr-defined]
    tensors = {
        "base": base,
        "same": base,
        "row": base[3],
        "turned": base.t()[2:, 1:5],
        "stepped": base[::2, 1::3],
        "expanded": torch.tensor([1.5]).expand(3, 4),
        "whole": whole.view(2, 3, 4),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "bool": torch.tensor([True, False, True]),
        "ints": [torch.tensor([-3, 5], dtype=d) for d in (torch.int8, torch.int16, torch.int32, torch.int64)],
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "complex": torch.tensor([1 + 2j]),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 4),
        "none": torch.zeros(0),
        "parameter": torch.nn.Parameter(base.clone()),
        "marked": marked,
        "last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "state_dict": state,  # an OrderedDict with an attribute _metadata
    }
    if kind == "zip":  # of the legacy format, torch itself cannot read these
        tensors["uint16"] = torch.tensor([1, 60000], dtype=torch.uint16)
        tensors["float8"] = torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn)
    return tensors


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize("with_foreign", [False, True])
def test_tensors_of_torch(tmp_path: Path, kind: str, with_foreign: bool, foreign: types.ModuleType) -> None:
    content = many_tensors(kind) | {
        "meta": {"epoch": 12, "names": ("ä", "b"), "lr": 0.1, "raw": b"\xff\x00", "no": None}
    }
    theirs = torch.load(save(content, tmp_path / "c", kind), weights_only=True)
    if with_foreign:
        save({**content, "log": foreign.Buffer(1)}, tmp_path / "c", kind)
    gone()
    found = read_checkpoint(tmp_path / "c")
    if with_foreign:
        assert found.pop("log") == Foreign("throwaway.things.Buffer")
    same(found, theirs)
    assert found["base"].data_ptr() + 3 * 8 * 4 == found["row"].data_ptr()
    assert found["base"].untyped_storage().data_ptr() == found["turned"].untyped_storage().data_ptr()
    before = (tmp_path / "c").read_bytes()
    found["base"].zero_()
    assert found["row"].sum() == 0
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_of_torch_files(tmp_path: Path, kind: str, protocol: int) -> None:
    content = many_tensors()
    path = tmp_path / "c.anything"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    same(read_checkpoint(path), content)


@pytest.mark.parametrize("kind", FORMATS)
def test_foreign_objects(tmp_path: Path, kind: str, foreign: types.ModuleType) -> None:
    config = foreign.Config(model=foreign.Config(type="MaskRCNN"), items=foreign.Items([1, 2]))
    config.attribute = 1
    objects = {
        "Buffer": foreign.Buffer(1, np.float32(2.5)),
        "Slotted": foreign.Slotted(3),
        "Config": config,
        "Items": foreign.Items([1, 2, 3]),
        "Made": foreign.Made(),
        "WithKeywords": foreign.WithKeywords(a=1),
        "Outer._Inner": foreign.Outer._Inner(),
    }
    content = {"meta": [objects, foreign.Buffer, foreign.Buffer.mean], "state_dict": {"x": 1}}
    for protocol in (2, 4, 5) if kind == "pickle" else (2, 4):
        if kind == "pickle":
            (tmp_path / "c").write_bytes(pickle.dumps({**content, "meta": content["meta"][:2]}, protocol))
        else:
            options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": kind == "zip"}
            torch.save({**content, "meta": content["meta"][:2]}, tmp_path / "c", **options)
        found = read_checkpoint(tmp_path / "c")
        assert found["meta"] == [
            {
                # Protocol 2 makes what needs keywords by way of a partial call, whose class is not kept.
                name: Foreign(
                    "functools.partial" if (name, protocol) == ("WithKeywords", 2) else f"throwaway.things.{name}"
                )
                for name in objects
            },
            Foreign("throwaway.things.Buffer"),
        ]
        assert found["state_dict"] == {"x": 1}
    save(content, tmp_path / "c", kind)  # protocol 2 mentions a method as getattr(Buffer, "mean")
    gone()
    assert read_checkpoint(tmp_path / "c")["meta"][2] == Foreign("throwaway.things.Buffer.mean")


@pytest.mark.parametrize("kind", FORMATS)
def test_objects_of_the_standard_library(tmp_path: Path, kind: str) -> None:
    import argparse
    import datetime
    import decimal
    import uuid

    found = read_checkpoint(
        save(
            {
                "args": argparse.Namespace(lr=0.1),
                "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
                "path": Path("/tmp"),
                "id": uuid.UUID(int=1),
                "price": decimal.Decimal(3),
                "counts": collections.Counter("aab"),
                "groups": collections.defaultdict(list, {"a": [1]}),
                "set": {1, 2},
                "frozen": frozenset([3]),
                "array": bytearray(b"ab"),
                "no bytes": b"",
                "complex": 1 + 2j,
                "type": int,
                "big": 2**80,
            },
            tmp_path / "c",
            kind,
        )
    )
    same(
        found,
        {
            "args": Foreign("argparse.Namespace"),
            "when": Foreign("datetime.datetime"),
            "path": Foreign("pathlib.PosixPath"),
            "id": Foreign("uuid.UUID"),
            "price": Foreign("decimal.Decimal"),
            "counts": {"a": 2, "b": 1},
            "groups": {"a": [1]},
            "set": {1, 2},
            "frozen": frozenset([3]),
            "array": b"ab",
            "no bytes": b"",
            "complex": 1 + 2j,
            "type": Foreign("builtins.int"),
            "big": 2**80,
        },
    )


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_objects_of_torch(tmp_path: Path, kind: str) -> None:
    content = {"dtype": torch.float16, "device": torch.device("cuda:1"), "size": torch.Size([2, 3]), "set": {1}}
    expected = {"dtype": Foreign("torch.float16"), "device": Foreign("torch.device"), "size": (2, 3), "set": {1}}
    same(read_checkpoint(save(content, tmp_path / "c", kind)), expected)
    content = {
        "sparse": torch.eye(2).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.empty(3, device="meta"),
        "x": torch.ones(1),
    }
    found = read_checkpoint(save(content, tmp_path / "c", kind))
    assert found.pop("x").tolist() == [1]
    assert found == dict.fromkeys(("sparse", "quantized", "meta"), Foreign("torch.Tensor"))


def test_a_whole_model_and_an_optimiser_are_only_names(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for kind in TORCH_FORMATS:
        found = read_checkpoint(save({"m": model, "o": torch.optim.SGD(model.parameters())}, tmp_path / "c", kind))
        assert found == {"m": Foreign("torch.nn.modules.linear.Linear"), "o": Foreign("torch.optim.sgd.SGD")}


def arrays() -> dict[str, Any]:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        "c": values,
        "fortran": np.asfortranarray(values),
        "turned": values.transpose(1, 0, 2),
        "stepped": values[:, ::2],
        "big endian": values.astype(">f4"),
        "big endian fortran": np.asfortranarray(values.astype(">i2")),
        "empty": np.zeros((0, 3)),
        "0-d": np.array(2.5),
        "kinds": [np.array([1, 0, 3]).astype(code) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "f2", "f8")],
        "complex": np.array([1 + 2j]),
    }


SCALARS = {"f": np.float32(0.5), "d": np.float64(0.1), "i": np.int64(-3), "b": np.bool_(True), "h": np.float16(2)}
NOT_NUMBERS = {"o": np.array([{}, None]), "s": np.array(["a"]), "v": np.zeros(2, [("a", "f4")]), "t": np.str_("x")}


@pytest.mark.parametrize("kind", ["zip", "legacy", 2, 3, 4, 5])
def test_numpy(tmp_path: Path, kind: str | int) -> None:
    content = {"model": arrays(), "scalars": SCALARS, "other": NOT_NUMBERS, "__author__": "Caffe2"}
    path = tmp_path / "c.pkl"
    if isinstance(kind, str):
        save(content, path, kind)
    else:
        path.write_bytes(pickle.dumps(content, kind))
    found = read_checkpoint(path)
    assert found["__author__"] == "Caffe2"
    for name, array in arrays().items():
        for ours, theirs in (
            zip(found["model"][name], array, strict=True) if name == "kinds" else [(found["model"][name], array)]
        ):
            assert type(ours) is Tensor
            assert str(ours.dtype) == f"torch.{theirs.dtype.name}"
            assert ours.shape == theirs.shape
            assert np.array_equal(ours.numpy(), theirs)
            ours.zero_()  # is writable
    same(found["scalars"], {name: value.item() for name, value in SCALARS.items()})
    assert {type(value) for value in found["other"].values()} == {Foreign}


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Strings are bytes there, and numpy is under its old name; as in the model zoo of detectron."""
    raw = np.array([1.5, -2], "<f4").tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85" + dtype
    program = b"\x80\x02}(U\x01w" + array + b"\x89U\x08" + raw + b"tbU\x01sc__builtin__\nset\n]K\x01a\x85Ru."
    (tmp_path / "c").write_bytes(program)
    found = read_checkpoint(tmp_path / "c")
    assert found["w"].tolist() == [1.5, -2]
    assert found["s"] == {1}


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_safetensors_and_the_wrong_suffix(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0).half()}
    save_file(state, path)
    same(read_checkpoint(path), dict(sorted(state.items())))
    for kind in TORCH_FORMATS:
        same(read_checkpoint(save(state, path, kind)), state)
    path.write_bytes((8).to_bytes(8, "little") + b"{damaged}")
    with pytest.raises(UserError, match=f"^{path}: is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_what_was_checked_is_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("a second reader was asked")

    state = {"x": torch.arange(3.0), "p": torch.nn.Parameter(torch.ones(2))}
    save(state, tmp_path / "c", kind)
    monkeypatch.setattr(torch, "load", never)
    same(read_checkpoint(tmp_path / "c"), state)


@pytest.mark.parametrize("kind", FORMATS)
def test_shared_containers_stay_shared(tmp_path: Path, kind: str) -> None:
    shared = [1]
    found = read_checkpoint(save({"a": shared, "b": shared, "c": (shared,)}, tmp_path / "c", kind))
    assert found == {"a": [1], "b": [1], "c": ([1],)}
    assert found["a"] is found["b"] is found["c"][0]


# Files that want to run code


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.made = (function, args)

    def __reduce__(self) -> Any:
        return self.made


def attacks(marker: Path) -> dict[str, Any]:
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Evil(os.system, f"touch {marker}"),
        "builtins.eval": Evil(eval, touch),
        "builtins.exec": Evil(exec, touch),
        "builtins.getattr": Evil(getattr, "text", "upper"),
        "builtins.__import__": Evil(__import__, "antigravity"),
        "builtins.open": Evil(open, str(marker), "w"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "torch.serialization.load": Evil(torch.load, str(marker)),
        "torch.hub.load": Evil(torch.hub.load, "x", "y"),
        "numpy.load": Evil(np.load, str(marker)),
        "pathlib.Path.touch": Evil(Path.touch, str(marker)),
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_malicious_pickles(tmp_path: Path, kind: str, nested: bool, name: str) -> None:
    marker = tmp_path / "marker"
    evil = attacks(marker)[name]
    path = save({"state_dict": {"x": 1}, "meta": {"log": [evil]}} if nested else evil, tmp_path / "c", kind)
    with pytest.raises(UserError, match=f"^{path}: tries to run '.*' when it is opened; it was not loaded") as caught:
        read_checkpoint(path)
    assert name.split(".")[-1] in str(caught.value) or "getattr" in str(caught.value)
    assert not marker.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "nt.system",
        "__builtin__.eval",
        "__builtin__.apply",
        "commands.getoutput",
        "copy_reg.add_extension",
        "builtins.type",
        "builtins.getattr",
        "builtins.setattr",
        "builtins.map",
        "importlib.import_module",
        "operator.attrgetter",
        "functools.reduce",
        "pickle.loads",
        "runpy.run_path",
        "shutil.rmtree",
        "ctypes.CDLL",
        "code.InteractiveInterpreter",
        "torch.load",
        "torch.storage._load_from_bytes",
        "torch.jit.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch._inductor.codecache.compile_file",
        "torch.classes.load_library",
        "torch.ops.load_library",
        "torch.package.PackageImporter",
        "torch.nn.modules.module.torch.load",
        "numpy.testing._private.utils.runstring",
        "numpy.load",
        "numpy.f2py.compile",
        "numpy.core.multiarray.fromfile",
        "somewhere.function",
        "somewhere.Class.method",
        "somewhere._private",
        "__main__.main",
    ],
)
def test_names_that_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "c"
    for program in (call(name, "touch marker"), b"cabsent\nThing\n)\x81" + call(name, "x") + b"b", call(name)[:-2]):
        path.write_bytes(wrap(b"\x80\x02}" + body("meta") + program + b"s.", kind))
        is_bare_getattr = name == "builtins.getattr" and program == call(name)[:-2]
        if is_bare_getattr:
            assert read_checkpoint(path) == {"meta": Foreign("builtins.getattr")}
            continue
        with pytest.raises(UserError, match=f"^{path}: tries to run '{name}' when it is opened"):
            read_checkpoint(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_function_of_a_third_party(tmp_path: Path, kind: str, foreign: types.ModuleType) -> None:
    marker = tmp_path / "marker"
    path = save({"meta": Evil(foreign.function, str(marker))}, tmp_path / "c", kind)
    with pytest.raises(UserError, match=r"tries to run 'throwaway\.things\.function'"):  # although it could be imported
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / "waiting_module.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\nclass Thing:\n    def __init__(self, *a): 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "c"
    path.write_bytes(wrap(b"\x80\x02" + call("waiting_module.Thing", 1) + b".", kind))
    assert read_checkpoint(path) == Foreign("waiting_module.Thing")
    assert "waiting_module" not in sys.modules
    assert not (tmp_path / "marker").exists()


STATE = {"dtype": 1, "call": 2, "made": 3, "name": "x", "__class__": 4}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("state", [STATE, (None, STATE), (STATE, STATE)])
def test_no_state_can_be_given_to_stand_ins(tmp_path: Path, kind: str, state: Any) -> None:
    """Opcode BUILD sets attributes on what it is given; on ours it sets none, for this file or for the next."""
    path = tmp_path / "c"
    targets = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nset\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"ctorch\nFloatStorage\n",
        b"}",
        b"]",
        b"X\x01\x00\x00\x00a",
        call("builtins.set", [1]),
    ]
    for target in targets:
        path.write_bytes(wrap(b"\x80\x02" + target + body(state) + b"b.", kind))
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)
    for target, expected in (
        (b"cabsent\nThing\n", Foreign("absent.Thing")),
        (b"cabsent\nThing\n)\x81", Foreign("absent.Thing")),
        (call("collections.OrderedDict", [("a", 1)]), {"a": 1}),
    ):
        path.write_bytes(wrap(b"\x80\x02" + target + body(state) + b"b.", kind))
        assert read_checkpoint(path) == expected
    save(many_tensors(), path, "zip")
    same(read_checkpoint(path), many_tensors())


def test_a_method_mentioned_is_not_a_method_called(tmp_path: Path) -> None:
    path = tmp_path / "c"
    mention = b"cbuiltins\ngetattr\n(cabsent\nThing\nX\x03\x00\x00\x00runtR"
    path.write_bytes(b"\x80\x02" + mention + b".")
    assert read_checkpoint(path) == Foreign("absent.Thing.run")
    path.write_bytes(b"\x80\x02" + mention + b")R.")
    with pytest.raises(UserError, match=r"tries to run 'absent\.Thing\.run'"):
        read_checkpoint(path)
    path.write_bytes(b"\x80\x02cbuiltins\ngetattr\n(cpathlib\nPosixPath\nX\x05\x00\x00\x00touchtR.")
    with pytest.raises(UserError, match=r"tries to run 'builtins\.getattr'"):
        read_checkpoint(path)


# Files that lie or are damaged

FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_a_file_written_by_hand(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    for options, expected in (
        ({}, [1, 2, 3, 4]),
        ({"offset": 1, "size": (2, 2), "stride": (1, 1)}, [[2, 3], [3, 4]]),
        ({"size": (2, 3), "stride": (0, 1)}, [[1, 2, 3], [1, 2, 3]]),
        ({"offset": 3, "size": (), "stride": ()}, 4),
        ({"size": (2, 0), "stride": (9, 9)}, [[], []]),
    ):
        path.write_bytes(wrap(tensor_program(kind=kind, **options), kind, {"0": FOUR}))
        found = read_checkpoint(path)
        assert found["f"] == Foreign("absent.things.Thing")
        assert found["t"].tolist() == expected


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize(
    "lie",
    [
        {"numel": 5},
        {"numel": 2**62},
        {"numel": 2**200},
        {"numel": -1},
        {"numel": "4"},
        {"numel": 4.0},
        {"key": "1"},
        {"key": 0},
        {"key": None},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**63},
        {"size": (5,)},
        {"size": (-4,)},
        {"size": (2**62,)},
        {"size": (2**100,)},
        {"size": (4.0,)},
        {"size": [4]},
        {"size": None},
        {"size": (2, 2)},
        {"size": (2, 2), "stride": (3, 1)},
        {"size": (2, 2), "stride": (2**62, 1)},
        {"size": (2, 2), "stride": (2**70, 1)},
        {"size": (0, 2**61, 2**61), "stride": (1, 1, 1)},
        {"stride": (-1,)},
        {"stride": (2,)},
        {"stride": ("1",)},
        {"stride": ()},
    ],
)
def test_lies_about_sizes(tmp_path: Path, kind: str, lie: dict[str, Any]) -> None:
    path = tmp_path / "c"
    path.write_bytes(wrap(tensor_program(kind=kind, **lie), kind, {"0": FOUR}) + bytes(64 if kind == "legacy" else 0))
    with pytest.raises(UserError, match=f"^{path}: is damaged or was cut off"):
        read_checkpoint(path)


@pytest.mark.parametrize("count", [0, 3, 5, 2**40, 2**62, -1])
def test_lies_about_legacy_storages(tmp_path: Path, count: int) -> None:
    path = tmp_path / "c"
    program = tensor_program(kind="legacy", numel=count)
    for content in (
        wrap(tensor_program(kind="legacy"), "legacy", {"0": FOUR}, counts={"0": count}),
        wrap(program, "legacy", {"0": FOUR}, counts={"0": count}),
        wrap(tensor_program(kind="legacy", key="x"), "legacy", {"0": FOUR}),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("shape", "raw", "order", "code"),
    [
        ((3,), bytes(8), "<", "f4"),
        ((1,), bytes(8), "<", "f4"),
        ((-2,), bytes(8), "<", "f4"),
        ((-2, -1), bytes(8), "<", "f4"),
        ((2**62, 4), b"", "<", "f4"),
        ((0, 2**62, 2**62), b"", "<", "f4"),
        ((1,) * 70, bytes(4), "<", "f4"),
        ((2**61,) * 2000, bytes(4), "<", "f4"),
        ("2", bytes(8), "<", "f4"),
        (None, bytes(8), "<", "f4"),
        ((2,), None, "<", "f4"),
        ((2,), bytes(8), "i4,", "f4"),
        ((2,), bytes(8), None, "f4"),
        ((2,), bytes(8), [1], "f4"),
    ],
)
def test_lies_about_arrays(tmp_path: Path, shape: Any, raw: Any, order: Any, code: Any) -> None:
    path = tmp_path / "c"
    dtype = call("numpy.dtype", code, False, True) + body((3, order, None, None, None, -1, -1, 0)) + b"b"
    new = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + body((0,)) + body("b") + b"tR"
    path.write_bytes(b"\x80\x02" + new + b"(" + body(1) + body(shape) + dtype + b"\x89" + body(raw) + b"tb.")
    with pytest.raises(UserError, match=f"^{path}: is damaged"):
        read_checkpoint(path)


def test_sides_are_counted_before_they_are_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "c"
    sides = (2**61,) * 65
    path.write_bytes(wrap(tensor_program(size=sides, stride=sides), "zip", {"0": FOUR}))
    with pytest.raises(UserError, match="a tensor has too many dimensions"):
        read_checkpoint(path)
    dtype = call("numpy.dtype", "f4", False, True) + body((3, "<", None, None, None, -1, -1, 0)) + b"b"
    new = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + body((0,)) + body("b") + b"tR"
    path.write_bytes(b"\x80\x02" + new + b"(" + body(1) + body(sides) + dtype + b"\x89" + body(bytes(4)) + b"tb.")
    with pytest.raises(UserError, match="an array has too many dimensions"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b"}" + b"K\x01}" * 50_000 + b"s" * 50_000 + b".",
        b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.",  # as a key it would be hashed, on C's stack
        b"\x80\x04(N" + b"\x85" * 1_000_000 + b"\x91.",
        b"\x80\x02N" + b"\x85" * 900 + b".",
        b"\x80\x02" + b"cbuiltins\ntuple\n" * 5000 + b"N" + b"\x85R" * 5000 + b".",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # an index of the memo: 32 GB
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x97.",
        b"\x80\x02}]Ns.",
        b"\x80\x02j\x05\x00\x00\x00.",
        b"\x80\x02e.",
        b"\x80\x02.",
        b"\x80\x02",
        b"\x80\x02\x93.",
        b"\x80\x02N)R.",
        b"\x80\x02N)\x81.",
        b"\x80\x02" + call("torch._utils._rebuild_tensor_v2") + b".",
        b"\x80\x02" + call("numpy._core.multiarray.scalar", 1, 2) + b".",
        b"\x80\x02" + call("builtins.bytes", 10**15) + b".",
        b"\x80\x02" + call("builtins.bytearray", 10**15) + b".",
        b"\x80\x02" + call("copyreg._reconstructor", dict, object, None) + b".",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x02" + body(("storage",)) + b"Q.",
        b"\x80\x02" + body(("elsewhere", "a", "b", "c", 1)) + b"Q.",
    ],
    ids=range(28),
)
def test_malformed_pickles(tmp_path: Path, kind: str, program: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(wrap(program, kind))
    with pytest.raises(UserError, match=f"^{path}: (is damaged or was cut off|tries to run 'builtins.dict')"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_big_endian_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    path.write_bytes(wrap(tensor_program(kind=kind), kind, {"0": FOUR}, order=b"big"))
    with pytest.raises(UserError, match=f"^{path}: was written on a big-endian machine"):
        read_checkpoint(path)


def test_zip_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(wrap(tensor_program(), "zip", {"0": FOUR}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=f"^{path}: is a compressed or encrypted zip archive; unpack it"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", b"x")
    with pytest.raises(UserError, match=f"^{path}: is a zip archive but no checkpoint; unpack it"):
        read_checkpoint(path)
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), path)
    with pytest.raises(UserError, match=f"^{path}: is a TorchScript program"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("with_foreign", [False, True])
def test_truncated_files(tmp_path: Path, kind: str, with_foreign: bool, foreign: types.ModuleType) -> None:
    content = arrays() if kind == "pickle" else many_tensors()
    path = save({**content, "f": foreign.Buffer() if with_foreign else 1}, tmp_path / "c", kind)
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.6, 0.9, 0.9999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match=f"^{path}: is damaged or was cut off .*; download it again$"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "is only a git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        (b"just some text, nothing else\n", "is no checkpoint"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "is no checkpoint"),
        (b"\x80", "is damaged"),
        (b"\x80\x09abc", "is no checkpoint"),
        (b"PK\x03\x04", "is damaged"),
        (b"PK\x03\x04" + bytes(1000), "is damaged"),
        (bytes(257) + b"ustar" + bytes(300), "is a tar archive"),
        ((2**62).to_bytes(8, "little") + b"{}", "is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        read_checkpoint(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: is a folder; give the checkpoint file in it$"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path / 'gone'}: there is no such file"):
        read_checkpoint(tmp_path / "gone")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"x")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=f"^{path}: could not be read .Permission denied"):
        read_checkpoint(path)


# Files made to exhaust whoever reads them

NOT_LOADED = "was not loaded .*; get the checkpoint from a source that you trust$"
TWICE = b"2\x86" * 40  # DUP, TUPLE2: a tuple of two, each of two, ...


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "program",
    [
        b"})" + TWICE + b"Ns.",  # a key that takes 2^40 steps to hash
        b"}()" + TWICE + b"Nu.",
        b"()" + TWICE + b"Nd.",
        b"\x8f()" + TWICE + b"\x90.",
        b"()" + TWICE + b"\x91.",
        b"cbuiltins\nset\n](" + b")" + TWICE + b"e\x85R.",
        b"ccollections\nOrderedDict\n(](" + b")" + TWICE + b"N\x86etR.",
        b"ccollections\nOrderedDict\n)R)" + TWICE + b"Ns.",
        b"}cbuiltins\nfrozenset\n](" + b")" + TWICE + b"e\x85RNs.",
        b")" + TWICE + b".",  # nothing is hashed, but whoever prints it never ends
        b"]2a.",  # holds itself
        b"}q\x00(K\x01h\x00u.",
        b"](" + b"N" * 1_000_001 + b"e.",
        b"}(" + b"".join(body((i, i)) + b"N" for i in range(1001)) + b"u.",
        b"}(" + b"".join(body(i * (2**61 - 1)) + b"N" for i in range(1, 1002)) + b"u.",  # all of one hash
        b"cbuiltins\nlist\nq\x00](" + b"N" * 10_000 + b"eq\x01" + b"h\x00h\x01\x85R" * 600 + b".",
        b"cbuiltins\nbytes\nq\x00"
        + b"X"
        + struct.pack("<I", 10**6)
        + b"x" * 10**6
        + b"q\x010"
        + b"h\x00h\x01\x85R" * 100
        + b".",
        b"(" + b"".join(b"cabsent\nThing%d\n" % i for i in range(10_001)) + b"t.",
    ],
    ids=range(18),
)
def test_pickles_that_unfold_without_end(tmp_path: Path, kind: str, program: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(wrap(b"\x80\x02" + program, kind))
    with pytest.raises(UserError, match=f"^{path}: {NOT_LOADED}"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_keys_that_are_small_tuples_or_numbers_are_read(tmp_path: Path, kind: str) -> None:
    content = {(1, (2, "x")): 1, 2**70: 2, b"b": 3, None: 4, 1.5: 5, frozenset([(1, 2)]): 6, np.int64(3): 7}
    content |= {"set": {(1, 2)}, "big": set(range(3000))}
    same(read_checkpoint(save(content, tmp_path / "c", kind)), {**content, 3: 7})


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_tensors_that_claim_more_than_the_file_has(tmp_path: Path, kind: str) -> None:
    path, half = tmp_path / "c", torch.ones(1).half()
    for tensors in ([half.expand(10**12)], [half.expand(10**6, 10**6)], [half.expand(10**6, i) for i in range(1, 9)]):
        save(dict(enumerate(tensors)), path, kind)
        with pytest.raises(UserError, match=f"^{path}: {NOT_LOADED}"):
            read_checkpoint(path)
    whole = torch.ones(10**6)
    found = read_checkpoint(save({"a": whole, "b": whole[1:], "c": half.expand(10**6)}, path, kind))
    assert [found[key].sum().item() for key in "ab"] == [10**6, 10**6 - 1]
    assert found["c"].shape == (10**6,)


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_two_entries_of_one_name(tmp_path: Path, name: str) -> None:
    """One reader of zip files takes the first, another the last."""
    path = tmp_path / "c"
    path.write_bytes(wrap(tensor_program(), "zip", {"0": FOUR}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, FOUR)
    with pytest.raises(UserError, match=f"^{path}: was not loaded .*two entries '{name}'"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("valid") / "c"
    files = {}
    state = {"w": torch.arange(6.0).view(2, 3).t(), "h": torch.ones(3).half(), "m": {"a": (1, 2.5, "x"), "n": None}}
    for kind in TORCH_FORMATS:
        files[f"{kind}, torch"] = save(state, path, kind).read_bytes()
        files[kind] = save({**state, "a": np.arange(3), "s": np.float32(1)}, path, kind).read_bytes()
        files[f"{kind}, by hand"] = wrap(tensor_program(kind=kind), kind, {"0": FOUR})
    for protocol in (2, 5):
        files[f"pickle {protocol}"] = pickle.dumps({"w": np.ones((2, 3), "f4"), "s": np.float64(2)}, protocol)
    save_file({"w": torch.ones(3)}, path)
    return files | {"safetensors": path.read_bytes()}


KINDS = ["zip, torch", "zip", "zip, by hand", "legacy, torch", "legacy", "legacy, by hand"]
KINDS += ["pickle 2", "pickle 5", "safetensors"]
QUICK = settings(database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_complains(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = read_checkpoint(path)
    except UserError as error:
        if not str(error).startswith(f"{path}: "):
            raise
    else:
        touch(found)


def touch(value: Any) -> None:
    """Read every number."""
    if isinstance(value, Tensor):
        if value.numel() < 10**6:
            value.clone()
    elif isinstance(value, dict):
        for item in value.values():
            touch(item)


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_byte(tmp_path: Path, valid: dict[str, bytes], kind: str) -> None:
    whole = valid[kind]
    touch(read_checkpoint_of(tmp_path / "c", whole))

    @QUICK
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def corrupt(place: int, change: int) -> None:
        content = bytearray(whole)
        content[place] ^= change
        reads_or_complains(tmp_path / "c", bytes(content))

    corrupt()


def read_checkpoint_of(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_checkpoint(path)


def starts() -> list[Callable[[bytes], bytes]]:
    return [
        lambda noise: noise,
        lambda noise: b"PK\x03\x04" + noise,
        lambda noise: b"\x80\x02" + noise + b".",
        lambda noise: b"\x80\x05" + noise + b".",
        lambda noise: wrap(b"\x80\x02" + noise + b".", "zip"),
        lambda noise: wrap(b"\x80\x02" + noise + b".", "legacy"),
        lambda noise: b"\x80\x02" + LEGACY_MAGIC + noise,
        lambda noise: len(noise).to_bytes(8, "little") + b"{" + noise,
    ]


@QUICK
@given(noise=st.binary(max_size=200), start=st.sampled_from(starts()))
def test_noise(tmp_path: Path, noise: bytes, start: Callable[[bytes], bytes]) -> None:
    reads_or_complains(tmp_path / "c", start(noise))


OPCODES = b"()]}lts.u0123NKUXRbaeqrhjc\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94Q"
PIECES = [bytes([code]) for code in OPCODES] + [
    b"cabsent\nThing\n",
    b"ccollections\nOrderedDict\n",
    b"cbuiltins\nlist\n",
    b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n",
    b"cnumpy._core.multiarray\n_reconstruct\n",
    b"cnumpy._core.numeric\n_frombuffer\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    body("f4"),
    body(("storage", 1, "0", "cpu", 4)),
    body((1, 2)),
]


@QUICK
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), kind=st.sampled_from(FORMATS))
def test_nonsense_programs(tmp_path: Path, pieces: list[bytes], kind: str) -> None:
    reads_or_complains(tmp_path / "c", wrap(b"\x80\x02" + b"".join(pieces) + b".", kind, {"0": FOUR}))
