"""Compiled layers give the numbers of layers as they are, for rows of any length, and are compiled where that pays."""

import logging
from functools import partial

import pytest
import torch
from torch._inductor import config as inductor_config
from transformers import AttentionInterface

from baton.errors import InputError
from baton.models.attention import NAME
from baton.models.forward import share_prefixes
from baton.models.trees import Layout
from baton.training.compiling import PAYS_FROM, compile_layers, compile_where_it_pays
from baton.training.memory import Sharding
from tests.models.tiny_models import model_of, one_thread, random_pairs
from tests.training.dpo_processes import summed_logps
from tests.training.test_what_a_run_says import config_of

__all__ = ["one_thread"]  # a fixture


def logps_and_gradients(model, rows):
    model.zero_grad()
    logps = summed_logps(model, rows)
    logps.sum().backward()
    return logps.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def compiled():
    """A model with activation checkpointing, what it computed of rows of several lengths before it was compiled, and those.

    Its graphs are run as torch traced them: the kernels that it makes of them are its own, and take a minute to compile.
    """
    torch._dynamo.reset()
    model, rows = model_of("llama").train(), random_pairs(20)
    share_prefixes(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = [rows[:2], rows[2:7], rows[7:8], rows[8:]]
    plain = [logps_and_gradients(model, part) for part in parts]
    names = list(model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        compile_layers(model)
    assert list(model.state_dict()) == names
    return model, plain, parts


def test_compiled_layers_give_the_same_numbers_and_are_compiled_once_for_rows_of_any_length(compiled):
    model, plain, parts = compiled
    kernels = []
    for part, (wanted, gradients) in zip(parts, plain, strict=True):
        logps, got = logps_and_gradients(model, part)
        torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
        kernels.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert kernels[0] > 0 and len(set(kernels)) == 1
    with torch.no_grad():  # runs as it is
        torch.testing.assert_close(summed_logps(model, parts[0]), plain[0][0], rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == kernels[0]


def test_attention_stays_outside_of_a_compiled_layer_and_what_it_compiles_stays_compiled(compiled, monkeypatch):
    inside, outside = [], []

    def backend(graphs):
        return lambda graph, _: graphs.append(graph) or graph.forward

    attend = torch.compile(lambda query: query + 1, backend=backend(inside))  # as FlexAttention on a GPU
    monkeypatch.setattr("baton.models.attention.by_trees", lambda query, *_: attend(query))

    @torch.compile(backend=backend(outside))
    def layer(query):
        output, _ = AttentionInterface()[NAME](None, 2 * query, query, query, layout=Layout([(4, [])]))
        return 2 * output

    query = torch.ones(1, 1, 4, 2)
    torch.testing.assert_close(layer(query), torch.full((1, 4, 1, 2), 6.0))
    assert len(inside) == 1 and len(outside) == 2


def test_only_a_training_that_is_long_enough_is_compiled_and_only_where_it_can_be(monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr("baton.training.compiling.compile_layers", compiled.append)
    long, short = PAYS_FROM["cpu"], PAYS_FROM["cpu"] / 2

    def decided(how, flops, sharding=None, **config):
        return compile_where_it_pays("model", how, flops, config_of(**config), sharding or Sharding(), in_4_bit=False)

    assert [decided("auto", short), decided("auto", long), decided("on", short), decided("off", long)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert len(compiled) == 2
    caplog.set_level(logging.INFO)
    zero_3 = Sharding(8, 3, deepspeed=True)
    assert not decided("auto", short, zero_3) and not caplog.text
    assert not decided("auto", long, zero_3)
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not decided("auto", long)
        with pytest.raises(InputError, match="`compile`: on, but there is no C"):
            decided("on", long)
    for said in ("not compiled: ZeRO-3 gathers a layer's weights", "not compiled: there is no C++ compiler: install g++"):
        assert said in caplog.text
