"""Reading weights of other projects: layouts, refusals, all or nothing."""

import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

from zoo.weights import load_weights, read_state_dict, sha256


def net(seed=0, out=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))


def equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_layouts(tmp_path):
    source = net(1)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    layouts = {"plain.pt": state, "checkpoint.th": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best": 91.7},
               "model.pt": {"model": state, "epoch": 3}}
    for name, content in layouts.items():
        torch.save(content, tmp_path / name)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors (zoo extra) is not installed")
    safetensors.save_file(state, tmp_path / "weights.safetensors")
    for name in [*layouts, "weights.safetensors"]:
        target = net(2)
        load_weights(target, tmp_path / name)
        assert equal(target, source), name


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("0.bias"), r"1 entries missing \(first: 0.bias\)"),
    (lambda s: s.update(extra=torch.ones(1)), r"1 not of this network \(first: extra\)"),
    (lambda s: s.update({"2.weight": torch.ones(7, 4)}), r"1 of another shape \(first: 2.weight, \(7, 4\) instead of \(2, 4\)\)"),
])
def test_another_architecture_is_refused_whole(tmp_path, change, message):
    state = net(1).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    target, before = net(2), net(2)
    with pytest.raises(ValueError, match="weights of another architecture: " + message):
        load_weights(target, tmp_path / "w.pt")
    assert equal(target, before)


@pytest.mark.parametrize("value, message", [
    (torch.full((4, 3), float("nan")), "holds values that are not finite, in 0.weight"),
    (torch.ones(4, 3, dtype=torch.complex64), r"1 of another kind of number \(first: 0.weight, torch.complex64\)"),
    (torch.ones(4, 3, dtype=torch.int64), "1 of another kind of number")])
def test_numbers_that_are_no_weights(tmp_path, value, message):
    torch.save(net(1).state_dict() | {"0.weight": value}, tmp_path / "w.pt")
    target, before = net(2), net(2)
    with pytest.raises(ValueError, match=message):
        load_weights(target, tmp_path / "w.pt")
    assert equal(target, before)
    half = {k: v.half() if v.is_floating_point() else v for k, v in net(1).state_dict().items()}
    torch.save(half, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target[0].weight.half(), half["0.weight"])


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')", ))


@pytest.mark.parametrize("content", [
    b"", b"not a file of weights", b"\x80\x02", pickle.dumps(Exploit()), pickle.dumps({"a": 1})])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_weights_file_is_refused_and_runs_nothing(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable weights file|holds no state dict"):
        read_state_dict(path)


def test_missing_or_truncated(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_state_dict(tmp_path / "none.pt")
    torch.save(net().state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 20)):
        (tmp_path / "w.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError) as e:
            read_state_dict(tmp_path / "w.pt")
        assert str(e.value).count("w.pt") == 1 and not re.search(r"miniz|likelihood|\. ", str(e.value).replace("(.safe", ""))


def test_sha256_of_a_known_string(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def in_pytorchcv_s_words(name, init):
    """The inverse of the loader's renaming, written by hand from pytorchcv's modules."""
    parts = name.split(".")
    if parts[0] in ("conv1", "bn1"):
        return ".".join(["features", *init, parts[0][:-1], *parts[1:]])
    if parts[0] in ("linear", "fc"):
        return f"output.{parts[1]}"
    unit = f"features.stage{parts[0][-1]}.unit{int(parts[1]) + 1}"
    if parts[2] in ("shortcut", "downsample"):
        return f"{unit}.identity_conv.{'conv' if parts[3] == '0' else 'bn'}.{parts[4]}"
    kind, number = parts[2][:-1], parts[2][-1]
    return f"{unit}.body.conv{number}.{kind}.{parts[3]}"


def in_chenyaofo_s_words(name):
    return name.replace("shortcut.", "downsample.").replace("linear.", "fc.")


@pytest.mark.parametrize("architecture", ["resnet20", "torchvision's"])
@pytest.mark.parametrize("layout", ["own", "chenyaofo", "pytorchcv"])
def test_layouts_of_other_collections(tmp_path, architecture, layout):
    if architecture == "resnet20":
        from zoo.models.cifar_resnet import resnet20 as build
    else:
        resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision (zoo extra) is not installed")
        build = partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 2])
    torch.manual_seed(1)
    source = build(num_classes=7)
    init = ["init_block"] if architecture == "resnet20" else ["init_block", "conv"]
    name = dict(own=str, chenyaofo=in_chenyaofo_s_words, pytorchcv=lambda n: in_pytorchcv_s_words(n, init))[layout]
    torch.save({name(k): v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    target = build(num_classes=7)
    load_weights(target, tmp_path / "w.pt")
    assert equal(target, source)


def test_padding_shortcuts_do_not_take_the_weights_of_convolutions(tmp_path):
    from zoo.models.cifar_resnet import resnet20
    torch.save(resnet20(shortcut="B").state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not of this network .first: layer2.0.shortcut.0.weight"):
        load_weights(resnet20(shortcut="A"), tmp_path / "w.pt")
