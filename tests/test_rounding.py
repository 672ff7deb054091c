"""Both INT8 labs keep the weights that preparation rounded: whole numbers times the scale it chose, nothing lost."""

import warnings

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from scipy.spatial.distance import cdist

from lab04.quantise import onnx_graph, preparation, torch_int8
from lab04.read import classifier


def linears(network) -> dict:
    return {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def test_int8_times_scale_is_the_prepared_weight_in_both_artefacts(model_folder, few_headlines, tmp_path):
    fp32 = classifier.load(str(model_folder("minilm", 9)))
    prepared = preparation.prepare(fp32)
    expected = {name: module.weight.detach().numpy() for name, module in linears(prepared).items()}
    assert len(expected) == 2 * 6 + 2

    torch_int8.choose_engine()
    quantised = torch_int8.quantise(prepared)
    for name, weight in expected.items():
        kept = quantised.get_submodule(name).weight()
        np.testing.assert_allclose(kept.dequantize().numpy(), weight, rtol=1e-5, atol=1e-9, err_msg=name)
        assert np.abs(kept.int_repr().numpy()).max() <= preparation.STEPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = onnx_graph.export(prepared, tmp_path)
    fused = onnx_graph.fuse(exported, fp32.model.config, tmp_path / "fused.onnx")
    onnx_graph.quantise(fused, tmp_path / "int8.onnx")
    found: dict[int, list] = {}
    constants = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    for name, weight in constants.items():
        if name.endswith("_quantized"):
            scale = constants[name.removesuffix("_quantized") + "_scale"]
            found.setdefault(len(weight), []).append((weight * scale).T)
    for inputs in {weight.shape[1] for weight in expected.values()}:
        wanted = np.concatenate([weight for weight in expected.values() if weight.shape[1] == inputs])
        kept = np.concatenate(found[inputs])
        assert kept.shape == wanted.shape
        # Attention has query, key and value in one matrix: every row must be there, in whatever place.
        assert cdist(wanted, kept, "chebyshev").min(axis=1).max() < 1e-6
