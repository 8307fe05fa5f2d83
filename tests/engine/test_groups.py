"""Parameter groups, bfloat16 weights with exact masters, averages, and updates made from several losses."""

import copy

import pytest
import torch
from torch import nn

from fastcraft.engine.out_of_memory import MemoryRanOutError, is_out_of_memory
from fastcraft.engine.schedule import lr_at
from fastcraft.engine.zero2 import ParameterGroup

CONFIGS = ["zero2.json", "zero1.json", "zero2_offload.json"]


class TwoParts(nn.Module):
    """One part reads what the other makes, as a UNet reads text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(6, 5)
        self.unet = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, part, x):
        return getattr(self, part)(x)


def two_parts(seed=0):
    torch.manual_seed(seed)
    return TwoParts()


def groups_of(module, *, rates=(1e-2, 1e-3), decays=(0.0, 0.0)):
    return [
        ParameterGroup(
            name=name,
            parameters={f"{name}.{key}": param for key, param in module.get_submodule(name).named_parameters()},
            learning_rate=rate,
            ema_decay=decay,
        )
        for name, rate, decay in zip(("text", "unet"), rates, decays, strict=True)
    ]


def batches(count, rows=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 6, generator=generator) for _ in range(count)]


def loss_of(forward, batch):
    return (forward("unet", forward("text", batch)).float() - 1).pow(2).mean()


def update(engine, batch):
    engine.begin()
    engine.backward(loss_of(engine, batch))
    return engine.step()


def equal(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


def rate(number, peak):
    return lr_at(number, peak=peak, warmup_steps=2, total_steps=10, schedule="cosine")


@pytest.mark.parametrize("config", [*CONFIGS, "zero2_fp32.json"])
def test_every_group_has_its_own_learning_rate(config, make_engine):
    module, plain = two_parts(), two_parts()
    engine = make_engine(config, module, options={"groups": groups_of(module)})
    optimizer = torch.optim.AdamW(
        [{"params": part.parameters(), "lr": 0.0} for part in (plain.text, plain.unet)], weight_decay=0.01
    )
    for number, batch in enumerate(batches(5)):
        rates = {"text": rate(number, 1e-2), "unet": rate(number, 1e-3)}
        assert engine.lr == rates
        assert update(engine, batch).lr == rates
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group, value in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = value
        optimizer.step()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(engine.trainable_parameters()[name], param, rtol=1e-4, atol=1e-6)
    moved = {name: (param - two_parts().get_parameter(name)).abs().max() for name, param in module.named_parameters()}
    assert moved["text.weight"] > 5 * moved["unet.0.weight"]


def test_groups_have_all_that_is_trained(make_engine):
    module = two_parts()
    with pytest.raises(ValueError, match="must have all trained parameters"):
        make_engine(model=module, options={"groups": groups_of(module)[:1]})


def rounded(module, dtype=torch.bfloat16):
    """The module's float32 values by name, and the module in ``dtype``."""
    exact = {name: param.detach().clone() for name, param in module.named_parameters()}
    return exact, module.to(dtype)


@pytest.mark.parametrize("config", CONFIGS)
def test_masters_of_bf16_weights_are_the_exact_values(config, make_engine):
    module = two_parts()
    exact, _ = rounded(module)
    given = copy.deepcopy(exact)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in given.values())
    engine = make_engine(config, module, dtype="bfloat16", options={"exact": exact, "groups": groups_of(module)})
    assert exact == {}, "they are handed over"
    state = engine.state()
    for name, tensor in given.items():
        assert state[f"param.{name}"].dtype == torch.float32
        assert torch.equal(state[f"param.{name}"], tensor), name
        assert torch.equal(module.get_parameter(name), tensor.bfloat16())
        assert not state[f"exp_avg.{name}"].any()
        assert not state[f"exp_avg_sq.{name}"].any()
    masters = engine.masters()
    assert all(torch.equal(masters[name], tensor.flatten()) for name, tensor in given.items())


def plain_with_masters(model, count, *, peak):
    """The same in plain torch: gradients by the rounded weights, the update on float32 ones."""
    masters = {name: nn.Parameter(param.detach().clone()) for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.0, weight_decay=0.01)
    for number, batch in enumerate(batches(count)):
        model.bfloat16()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(masters[name])
        model.zero_grad()
        loss_of(model, batch.bfloat16()).backward()
        for name, param in model.named_parameters():
            masters[name].grad = param.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(number, peak)
        optimizer.step()
    return masters


@pytest.mark.parametrize("config", CONFIGS)
def test_updates_far_below_bf16_resolution_add_up(config, make_engine):
    module, peak = two_parts(), 1e-6
    exact, _ = rounded(module)
    first = copy.deepcopy(exact)
    engine = make_engine(
        config, module, dtype="bfloat16",
        options={"exact": exact, "groups": groups_of(module, rates=(peak, peak))},
    )  # fmt: skip
    for batch in batches(6):
        assert update(engine, batch.bfloat16()).took_step
    wanted, state = plain_with_masters(two_parts(), 6, peak=peak), engine.state()
    for name, start in first.items():
        change = state[f"param.{name}"] - start
        assert 0 < change.abs().max() <= 6.1e-6, name
        torch.testing.assert_close(change, wanted[name].detach() - start, rtol=0.05, atol=2e-7, msg=name)
        assert torch.equal(module.get_parameter(name), state[f"param.{name}"].bfloat16()), (
            "weights are masters, rounded"
        )
        large = start.abs() > 0.01  # there a bf16 weight changes by 2e-5 at least, or not at all
        assert (change[large].abs() > 2e-6).any(), "more than one update's worth"
        still = module.get_parameter(name) == start.bfloat16()
        assert still.float().mean() > 0.5, "and most weights are the same in bf16"


@pytest.mark.parametrize("config", CONFIGS)
def test_bf16_training_goes_on_bit_exactly_from_a_state(config, make_engine):
    def engine_of(seed):
        module = two_parts(seed)
        exact, _ = rounded(module)
        return make_engine(config, module, dtype="bfloat16", options={
            "exact": exact, "groups": groups_of(module, decays=(0.9, 0.0))
        })  # fmt: skip

    first, second = engine_of(0), engine_of(1)
    for batch in batches(2):
        update(first, batch.bfloat16())
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second.load_state(state)
    equal(second.state(), state)
    for name, param in second.trainable_parameters().items():
        assert torch.equal(param, first.trainable_parameters()[name])
    for batch in batches(5)[2:]:
        assert update(first, batch.bfloat16()) == update(second, batch.bfloat16())
    equal(first.state(), second.state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_average_is_that_of_the_float32_weights(config, dtype, make_engine):
    module, exact = two_parts(), None
    if dtype == "bfloat16":
        exact, _ = rounded(module)
    options = {"groups": groups_of(module, decays=(0.25, 0.0)), "exact": exact}
    engine = make_engine(config, module, dtype=dtype, options=options)
    state = engine.state()
    averages = {name: state[f"param.{name}"].clone() for name in ("text.weight", "text.bias")}
    assert {name for name in state if name.startswith("ema.")} == {f"ema.{name}" for name in averages}
    for name, average in averages.items():
        assert torch.equal(state[f"ema.{name}"], average), "it begins at the weights"
    for number, batch in enumerate(batches(5), start=1):
        update(engine, batch.to(getattr(torch, dtype)))
        state, decay = engine.state(), min(0.25, (1 + number) / (10 + number))  # 2/11, 3/12, then the bound
        for name in averages:
            averages[name] = decay * averages[name] + (1 - decay) * state[f"param.{name}"]
            torch.testing.assert_close(state[f"ema.{name}"], averages[name], rtol=1e-6, atol=1e-7)
            assert (state[f"ema.{name}"] - state[f"param.{name}"]).abs().max() > 1e-4


def test_an_update_that_was_skipped_does_not_count_for_the_average(make_engine):
    module = two_parts()
    engine = make_engine(model=module, options={"groups": groups_of(module, decays=(0.9, 0.9))})
    update(engine, batches(1)[0])
    before = engine.state()
    engine.backward(loss_of(engine, batches(1)[0]) * float("nan"))
    assert engine.step().skipped
    equal(engine.state(), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_averages_take_the_weights_places_and_leave_them(dtype, make_engine):
    module, exact = two_parts(), None
    if dtype == "bfloat16":
        exact, _ = rounded(module)
    engine = make_engine(
        model=module, dtype=dtype, options={"groups": groups_of(module, decays=(0.9, 0.0)), "exact": exact}
    )
    data = [batch.to(getattr(torch, dtype)) for batch in batches(4)]
    for batch in data[:3]:
        update(engine, batch)
    weights, state = copy.deepcopy(module.state_dict()), engine.state()

    def look_and_fail():
        for name, param in module.named_parameters():
            averaged = state.get(f"ema.{name}")
            assert torch.equal(param, weights[name] if averaged is None else averaged.to(param.dtype)), name
        assert not torch.equal(module.text.weight, weights["text.weight"])
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), engine.averaged():
        look_and_fail()
    equal(dict(module.state_dict()), weights)
    equal(engine.state(), state)
    assert update(engine, data[3]).took_step


@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_with_averages_goes_on_bit_exactly(config, make_engine):
    engines = []
    for seed in (0, 1):
        module = two_parts(seed)
        engines.append(make_engine(config, module, options={"groups": groups_of(module, decays=(0.9, 0.5))}))
    first, second = engines
    for batch in batches(3):
        update(first, batch)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second.load_state(state)
    equal(second.state(), state)
    for batch in batches(6)[3:]:  # the warm-up of the averages goes on with the number of updates
        update(first, batch)
        update(second, batch)
    equal(first.state(), second.state())


@pytest.mark.parametrize("config", CONFIGS)
def test_three_losses_with_a_third_each_are_one_of_their_mean(config, make_engine):
    engines = []
    for _ in range(2):
        module = two_parts()
        engines.append(make_engine(config, module, options={"groups": groups_of(module)}))
    apart, joined = engines
    for round_ in range(3):
        micro = batches(9)[3 * round_ : 3 * round_ + 3]
        for number, batch in enumerate(micro):
            apart.begin()
            apart.backward(loss_of(apart, batch) / 3, closes_update=number == 2)
            if number < 2:
                with pytest.raises(RuntimeError, match="between"):
                    apart.gradients()
                result = apart.step()
                assert (result.took_step, result.skipped, result.grad_norm) == (False, False, None)
                assert apart.num_updates == round_
        joined.backward(torch.stack([loss_of(joined, batch) for batch in micro]).mean())
        for name, gradient in joined.gradients().items():
            torch.testing.assert_close(apart.gradients()[name], gradient, rtol=1e-5, atol=1e-7)
        results = apart.step(), joined.step()
        assert all(result.took_step for result in results)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert apart.num_updates == joined.num_updates == 3
    for name, param in joined.trainable_parameters().items():
        torch.testing.assert_close(apart.trainable_parameters()[name], param, rtol=1e-4, atol=1e-5)


def test_an_update_may_be_made_from_more_losses_than_the_last_one(make_engine):
    """An inner update of a round need not be as large as the others."""
    engines = []
    for _ in range(2):
        module = two_parts()
        engines.append(make_engine(model=module, options={"groups": groups_of(module)}))
    apart, joined = engines
    for micro in (batches(6)[:1], batches(6)[1:5], batches(6)[5:]):
        for number, batch in enumerate(micro, start=1):
            apart.begin()
            apart.backward(loss_of(apart, batch) / len(micro), closes_update=number == len(micro))
            apart.step()
        update(joined, torch.cat(micro))
    for name, param in joined.trainable_parameters().items():
        torch.testing.assert_close(apart.trainable_parameters()[name], param, rtol=1e-4, atol=1e-5)


def out_of_memory(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("config", ["zero2.json", "zero1.json"])
@pytest.mark.parametrize("already", [0, 1])
def test_memory_that_runs_out_before_the_watched_gradient_leaves_nothing(config, already, make_engine):
    engines = []
    for _ in range(2):
        module = two_parts()
        engines.append(make_engine(config, module, options={"groups": groups_of(module), "watched": module.unet}))
    data = batches(2)
    for engine, fails in zip(engines, (True, False), strict=True):
        if already:  # a loss of the same update has been added up before
            engine.begin()
            engine.backward(loss_of(engine, data[0]) / 2, closes_update=False)
            engine.step()
        before = engine.state()
        for _ in range(2 if fails else 0):
            engine.begin()
            picture = engine("unet", engine("text", data[1])) * 1
            picture.register_hook(out_of_memory)
            with pytest.raises(MemoryRanOutError, match=r"Tried to allocate 20\.00 MiB"):
                engine.backward(picture.sum(), closes_update=True)
            assert not engine.gradient_arrived
            equal(engine.state(), before)
        engine.begin()
        engine.backward(loss_of(engine, data[1]) / 2)
        assert engine.gradient_arrived
        engine.gradients_found = engine.gradients()
        assert engine.step().took_step
    equal(*(engine.gradients_found for engine in engines))
    equal(*(engine.state() for engine in engines))


def test_memory_that_runs_out_after_the_watched_gradient_is_not_taken_for_undone(make_engine):
    module = two_parts()
    engine = make_engine(model=module, options={"groups": groups_of(module), "watched": module.unet})
    engine.begin()
    text = engine("text", batches(1)[0])
    text.register_hook(out_of_memory)  # the UNet's gradients are being reduced by then
    with pytest.raises(torch.OutOfMemoryError) as error:
        engine.backward(engine("unet", text).sum())
    assert is_out_of_memory(error.value)
    assert engine.gradient_arrived
