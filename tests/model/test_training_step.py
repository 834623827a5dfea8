"""One training step equals the page it comes from, transcribed slowly (method, section 5)."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from asymlift.errors import BadRecipe
from asymlift.families import FAMILIES
from asymlift.maths.color import ColorCode
from asymlift.maths.diagnostics import covariance_trace
from asymlift.maths.loss import low_noise_weight
from asymlift.maths.patches import tokens_to_image
from asymlift.model import training_step
from asymlift.model.last_map import rows_of_picture
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.trainable import Adapters, train_parts
from asymlift.model.training_step import Batch, LossConstants, TrainingStep
from asymlift.runtime.parameters import Trainable
from tests.families.case import case_of
from tests.tiny import KINDS, lifted_pair, tiny_text

GRID = (2, 4)  # even, for 2 x 2 slots; or a square, where a family draws no others
PUBLISHED = LossConstants(
    shift=0.3,
    weight=10.0,
    sigma_clamp=0.05,
    control_floor=1e-4,
    student_floor=1e-6,
    reference_floor=1e-4,
    perceptual_weight=1.0,
    reduces_variance=True,
    skip_below=0.0,
    same_passes=False,
)
COLOR = ColorCode("rgb", (0.5, 0.4, 0.6), 0.3)


def perceptual(image: Tensor, target: Tensor) -> Tensor:
    """A map that sees neighbours across patches, and RGB, as LPIPS does."""
    difference = (image - target).square().sum(1, keepdim=True)
    return nn.functional.avg_pool2d(difference, 3, 1, 1) + image.abs().mean(1, keepdim=True)


class World:
    """A student that has learnt something, what it was converted from, and a batch."""

    def __init__(
        self,
        name: str = "flux2",
        *,
        dtype: torch.dtype = torch.float64,
        precision: torch.dtype | None = None,
        sigmas: tuple[float, ...] = (0.02, 0.4, 0.95),
    ) -> None:
        pair = lifted_pair(name, dtype=dtype, precision=precision)
        self.family, self.geometry = FAMILIES[name], pair.geometry
        pair.pixel.net.float().to(dtype)  # what trains is rounded to float32; so is the rest
        self.converted = copy.deepcopy(pair.pixel).requires_grad_(False)
        self.student = pair.pixel
        adapters = Adapters(2, 2.0, 0.0, self.family.lora_targets)
        self.trainable: Trainable = train_parts(
            self.student.net,
            self.family,
            adapters=adapters,
            modules=["first", "last", "final_norm"],
            keep_originals=True,
            seed=0,
        )
        g = torch.Generator().manual_seed(1)
        for parameter in self.trainable.parameters.values():
            noise = 0.05 * torch.randn(parameter.shape, generator=g)
            parameter.data = (parameter.data + noise).to(dtype)
        self.student.net.to(dtype if precision is None else torch.float32)
        high, wide = case_of(name).grid
        grid = GRID if high != wide else (2, 2)
        count, num = len(sigmas), math.prod(grid)
        z0 = torch.randn(count, num, self.geometry.d, generator=g).to(dtype)
        rest = 0.2 * torch.randn(count, num, self.geometry.D, generator=g).to(dtype)
        self.batch = Batch(
            x0=pair.s * z0 @ pair.A.T + rest,
            z0=z0,
            eps=torch.randn(count, num, self.geometry.D, generator=g).to(dtype),
            sigma=torch.tensor(sigmas, dtype=dtype),
            weight=torch.ones(count, dtype=dtype),
            text=tiny_text(name, count, dtype=dtype),
            grid=grid,
        )

    def step(
        self, constants: LossConstants = PUBLISHED, *, measure=None, copied: bool = False
    ) -> TrainingStep:
        reference = self.converted if copied else None
        return TrainingStep(self.student, reference, constants, COLOR.decode, measure)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        parameters = self.trainable.parameters
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(parameters.items(), found, strict=True)
        }


def transcribed(world: World, use: LossConstants, measure) -> tuple[Tensor, dict[str, Tensor]]:
    """Section 5 of the method, one number at a time."""
    batch, A, s = world.batch, world.student.A, world.student.s
    p = world.geometry.pixel_patch
    B, N, D = batch.x0.shape
    x_t, x0_low, x_t_low = (torch.zeros(B, N, D, dtype=A.dtype) for _ in range(3))
    for b in range(B):
        sigma = batch.sigma[b]
        for n in range(N):
            x0_low[b, n] = s * (A @ batch.z0[b, n])
            x_t[b, n] = (1 - sigma) * batch.x0[b, n] + sigma * batch.eps[b, n]
            x_t_low[b, n] = (1 - sigma) * x0_low[b, n] + sigma * batch.eps[b, n]
    u_student = world.student(x_t, batch.sigma, batch.text, GRID, floor=use.student_floor)
    with torch.no_grad():
        u_reference = world.converted(
            x_t_low, batch.sigma, batch.text, GRID, floor=use.reference_floor
        )
    total = torch.zeros((), dtype=A.dtype)
    logged = dict.fromkeys(("loss_flow", "loss_perceptual", "control"), 0.0)
    logged |= dict.fromkeys(("num_compared", "num_looked_at", "error_energy", "error_left"), 0.0)
    logged |= {"loss_by_sigma": [0.0] * 8, "num_by_sigma": [0.0] * 8}
    for b in range(B):
        sigma = float(batch.sigma[b])
        w = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + (use.shift * sigma) ** 2)
        clamped = max(sigma, use.sigma_clamp)
        x0_hat = x_t[b] - sigma * u_student[b]
        x0_low_hat = x_t_low[b] - sigma * u_reference[b]
        squares, gates, coefficients = [], [], []
        for n in range(N):
            of_colours = []
            for colour in range(3):
                pixels = slice(colour * p * p, (colour + 1) * p * p)
                x0 = batch.x0[b, n, pixels]
                low = x0_low[b, n, pixels] - x0_low_hat[n, pixels]
                full = x0 - x0_hat[n, pixels].detach()
                energy = max(float((low * low).mean()), use.control_floor)
                c = min(max(float((full * low).mean()) / energy, 0.0), 1.0)
                target = x0 - (1 - w) * c * low if use.reduces_variance else x0
                logged["error_energy"] += float(full @ full)
                logged["error_left"] += float((full - c * low) @ (full - c * low))
                squares += list((x0_hat[n, pixels] - target) ** 2)
                of_colours.append(c)
            coefficients += of_colours
            gates.append(math.sqrt(sum(c * c for c in of_colours) / 3))
        flow = 0.5 * use.weight * sum(squares) / len(squares) / clamped**2
        loss = flow
        if measure is not None:
            images = [
                COLOR.decode(tokens_to_image(tokens[None], p, GRID))
                for tokens in (x0_hat, batch.x0[b])
            ]
            distance = measure(*images)[0, 0]
            terms = []
            for row in range(GRID[0] * p):
                for column in range(GRID[1] * p):
                    n = (row // p) * GRID[1] + column // p
                    gate = gates[n] if use.reduces_variance else 1.0
                    terms.append(distance[row, column] * gate * w / clamped**2)
            added = use.perceptual_weight * sum(terms) / len(terms)
            logged["loss_perceptual"] += float(added.detach())
            logged["num_looked_at"] += 1
            loss = loss + added
        logged["loss_flow"] += float(flow.detach())
        logged["control"] += sum(coefficients) / len(coefficients)
        logged["num_compared"] += 1
        logged["loss_by_sigma"][int(8 * sigma)] += float(loss.detach())
        logged["num_by_sigma"][int(8 * sigma)] += 1
        total = total + loss
    return total, logged


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("measure", [None, perceptual])
@pytest.mark.parametrize("reduces_variance", [True, False])
def test_a_step_is_the_page_transcribed(reduces_variance, measure, copied):
    """Loss, what is logged, and every gradient; the reference shared or copied."""
    world = World()
    use = replace(PUBLISHED, reduces_variance=reduces_variance, perceptual_weight=0.7)
    expected, logged = transcribed(world, use, measure)
    expected_gradients = world.gradients(expected)

    loss, sums = world.step(use, measure=measure, copied=copied)(world.batch)

    # The perceptual map is handed on in float32.
    rtol = 1e-9 if measure is None else 1e-6
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    names = {"loss_flow", "loss_by_sigma", "num_by_sigma"}
    names |= {"loss_perceptual", "num_looked_at"} if measure else set()
    of_control = {"control", "num_compared", "error_energy", "error_left"}
    assert set(sums) == names | (of_control if reduces_variance else set())
    for name, value in sums.items():
        assert not value.requires_grad
        assert value.tolist() == pytest.approx(logged[name], rel=rtol), name
    for name, gradient in world.gradients(loss).items():
        scale = float(expected_gradients[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=10 * rtol, atol=10 * rtol * scale
        )


def test_the_example_exercises_every_clamp(monkeypatch):
    """Coefficients at 0, at 1 and between; a noise level below the clamp."""
    world = World()
    seen = []
    gate = training_step.perceptual_gate
    monkeypatch.setattr(training_step, "perceptual_gate", lambda c: seen.append(c) or gate(c))
    world.step(measure=perceptual)(world.batch)
    (c,) = seen
    assert (c == 0).any() and (c == 1).any() and ((c > 0) & (c < 1)).any()
    assert float(world.batch.sigma.min()) < PUBLISHED.sigma_clamp


@pytest.mark.parametrize("name", KINDS)
def test_in_every_family_the_shared_reference_is_the_copied_one(name):
    world = World(name)
    shared, _ = world.step()(world.batch)
    copied, _ = world.step(copied=True)(world.batch)
    assert torch.equal(shared, copied)


def test_as_converted_the_reference_explains_its_own_error():
    """Without training, student and reference differ only by what the latents lack."""
    world = World()
    world.batch.x0 = world.student.s * world.batch.z0 @ world.student.A.T
    step = TrainingStep(world.converted, world.converted, PUBLISHED, COLOR.decode, None)
    floors = replace(PUBLISHED, student_floor=1e-4, control_floor=1e-12)
    step.constants = floors
    _, sums = step(world.batch)
    assert float(sums["control"]) == pytest.approx(3.0)


@pytest.mark.parametrize("reduces_variance", [True, False])
def test_an_empty_slot_adds_nothing_to_loss_or_gradient(reduces_variance):
    use = replace(PUBLISHED, reduces_variance=reduces_variance)
    world = World()
    full = world.batch
    part = Batch(
        full.x0[::2],
        full.z0[::2],
        full.eps[::2],
        full.sigma[::2],
        full.weight[::2],
        {name: value[::2] for name, value in full.text.items()},
        GRID,
    )
    expected, sums_expected = world.step(use, measure=perceptual)(part)
    expected_gradients = world.gradients(expected)

    full.weight[1] = 0
    full.x0[1] = full.z0[1] = 0
    loss, sums = world.step(use, measure=perceptual)(full)

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, value in sums_expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-6, atol=0)
    for name, gradient in world.gradients(loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-6, atol=1e-9)


def test_only_empty_slots_give_exactly_nothing():
    world = World()
    world.batch.weight.zero_()
    loss, sums = world.step(measure=perceptual)(world.batch)
    assert loss == 0 and not any(value.any() for value in sums.values())
    assert not any(gradient.any() for gradient in world.gradients(loss).values())


def test_under_bf16_the_algebra_stays_float32():
    """Only the network and the perceptual net run in bf16, whatever surrounds the step."""
    world = World(dtype=torch.float32, precision=torch.bfloat16)
    seen: list[tuple[torch.dtype, bool, torch.dtype]] = []

    def spy(image: Tensor, target: Tensor) -> Tensor:
        enabled = torch.is_autocast_enabled("cpu")
        seen.append((image.dtype, enabled, torch.get_autocast_dtype("cpu")))
        return perceptual(image, target).bfloat16()

    step = world.step(measure=spy)
    loss, sums = step(world.batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside, sums_inside = step(world.batch)

    assert seen == [(torch.float32, True, torch.bfloat16)] * 2
    assert loss.dtype == torch.float32
    assert torch.equal(loss, inside)
    for name, value in sums.items():
        assert value.dtype == torch.float32 and torch.equal(value, sums_inside[name])
    for gradient in world.gradients(loss).values():
        assert gradient.dtype == torch.float32


def test_under_bf16_oklab_pictures_are_decoded_in_float32():
    """Rounded before Oklab's matrices, colours would be off by up to a fifth of their range."""
    world = World(dtype=torch.float32, precision=torch.bfloat16)
    color, seen = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16), []

    def spy(image: Tensor, target: Tensor) -> Tensor:
        seen.append(target.detach())
        return perceptual(image, target)

    step = world.step(measure=spy)
    step.to_picture = color.decode
    with torch.autocast("cpu", torch.bfloat16):
        step(world.batch)

    patch = world.student.geometry.pixel_patch
    real = tokens_to_image(world.batch.x0.double(), patch, world.batch.grid)
    assert_close(seen[0].double(), color.decode(real), atol=1e-5, rtol=0)


def test_in_full_precision_the_perceptual_net_is_not_rounded():
    world = World()
    seen = []

    def spy(image: Tensor, target: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return perceptual(image, target)

    world.step(measure=spy)(world.batch)
    assert seen == [False]


def test_the_floors_reach_the_branches_they_belong_to(monkeypatch):
    world = World()
    floors: dict[int, list[float]] = {id(world.student): [], id(world.converted): []}
    forward = PixelFlow.forward

    def spy(flow, *args, floor: float, **rest):
        floors[id(flow)].append(floor)
        return forward(flow, *args, floor=floor, **rest)

    monkeypatch.setattr(PixelFlow, "forward", spy)
    world.step(replace(PUBLISHED, student_floor=0.01, reference_floor=0.2), copied=True)(
        world.batch
    )
    assert floors == {id(world.student): [0.01], id(world.converted): [0.2]}


def test_the_perceptual_net_is_no_part_of_the_step():
    """It is neither trained, saved nor sharded."""
    world = World()
    step, without = world.step(measure=nn.Conv2d(3, 1, 1)), world.step()
    assert list(step.state_dict()) == list(without.state_dict())
    assert len(list(step.modules())) == len(list(without.modules()))


# ---- what is left out --------------------------------------------------------------------------


def counted(world: World, use: LossConstants, measure=None):
    """A step on the world's batch, and how many samples each of its passes was given."""
    sizes: dict[str, list[int]] = {"student": [], "reference": [], "perceptual": []}
    step = world.step(use, measure=measure and watched(sizes["perceptual"], measure), copied=True)
    hooks = [
        flow.register_forward_pre_hook(lambda _, given, n=name: sizes[n].append(len(given[0])))
        for name, flow in (("student", world.student), ("reference", world.converted))
    ]
    loss, sums = step(world.batch)
    for hook in hooks:
        hook.remove()
    return loss, sums, sizes


def watched(sizes: list[int], measure):
    def look(image: Tensor, target: Tensor) -> Tensor:
        sizes.append(len(image))
        return measure(image, target)

    return look


def share_of_correction(world: World) -> list[float]:
    return (1 - low_noise_weight(world.batch.sigma, PUBLISHED.shift)).tolist()


LEVELS = (0.02, 0.4, 0.95, 0.99, 1.0)


@pytest.mark.parametrize("measure", [None, perceptual])
def test_as_published_only_empty_slots_and_exact_zeros_are_left_out(measure):
    """w is zero at pure noise; c is a gate wherever a sample is looked at."""
    world = World(sigmas=LEVELS)
    world.batch.weight[1] = 0
    _, sums, sizes = counted(world, PUBLISHED, measure)
    assert sizes["student"] == [5] and sizes["reference"] == [4]
    assert sizes["perceptual"] == ([3] if measure else [])
    assert sums["num_compared"] == 4


@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_out_changes_nothing_for_what_is_kept(name):
    """Losses of the kept samples and every gradient, against one sample at a time."""
    whole = World(name, sigmas=LEVELS)
    use = replace(PUBLISHED, skip_below=0.4)
    loss, sums, sizes = counted(whole, use, perceptual)
    assert sizes == {"student": [5], "reference": [5], "perceptual": [2]}  # w: 1, 0.96, 0.03, 0, 0

    w = low_noise_weight(whole.batch.sigma, use.shift)
    expected, flow, one = 0.0, 0.0, World(name, sigmas=LEVELS)
    total: dict[str, Tensor] = {}
    for b in range(len(LEVELS)):
        one.batch.weight = torch.eye(len(LEVELS), dtype=torch.float64)[b]
        looks = perceptual if w[b] > 0.4 else None
        part, told = one.step(PUBLISHED, measure=looks, copied=True)(one.batch)
        expected, flow = expected + part, flow + told["loss_flow"]
        gradients = one.gradients(part)
        total = {key: g + total.get(key, 0.0) for key, g in gradients.items()}

    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_close(sums["loss_flow"], flow, rtol=1e-9, atol=0)
    for key, gradient in whole.gradients(loss).items():
        assert_close(gradient, total[key], rtol=1e-5, atol=1e-6 * float(total[key].abs().max()))


def test_without_eyes_the_reference_is_left_out_where_it_corrects_little():
    """There the target is the image itself."""
    world = World(sigmas=LEVELS)
    shares = share_of_correction(world)
    kept = [share > 0.1 for share in shares]
    assert 0 < sum(kept) < len(kept)
    loss, sums, sizes = counted(world, replace(PUBLISHED, skip_below=0.1))
    assert sizes["reference"] == [sum(kept)] and sums["num_compared"] == sum(kept)

    expected, one = 0.0, World(sigmas=LEVELS)
    for b, reduces in enumerate(kept):
        one.batch.weight = torch.eye(len(LEVELS), dtype=torch.float64)[b]
        part, _ = one.step(replace(PUBLISHED, reduces_variance=reduces), copied=True)(one.batch)
        expected += part
    assert_close(loss, expected, rtol=1e-9, atol=0)


def test_under_zero_3_one_sample_is_kept_and_says_nothing():
    """The ranks gather weights together; what one of them skips, all would wait for."""
    for weight in (0.0, 1.0):
        world = World(sigmas=(0.01, 0.02))
        world.batch.weight.fill_(weight)
        use = replace(PUBLISHED, skip_below=0.5)
        loss, sums, sizes = counted(world, use)
        alike, sums_alike, sizes_alike = counted(world, replace(use, same_passes=True))
        assert (sizes["reference"], sizes_alike["reference"]) == ([], [1])
        assert torch.equal(loss, alike)
        assert all(torch.equal(value, sums_alike[name]) for name, value in sums.items())


def test_a_loss_that_is_infinite_has_no_finite_gradient():
    """Or the update would be made: only gradients are looked at before it."""
    world = World(dtype=torch.float32)
    world.batch.x0[0] = 1e25
    loss, _ = world.step(replace(PUBLISHED, reduces_variance=False))(world.batch)
    assert not loss.isfinite()
    assert not any(gradient.isfinite().all() for gradient in world.gradients(loss).values())


# ---- the gradient's variance -------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradients_of_the_last_map_are_those_of_autograd(name):
    """Sample by sample, with the target that trains and with the plain one."""
    world = World(name, sigmas=(0.02, 0.4, 0.95, 0.7))
    world.batch.weight[3] = 0
    world.batch.measures = True
    _, sums = world.step()(world.batch)
    path, one = f"{world.family.last}.weight", world
    for target, reduces in (("", True), ("_plain", False)):
        gradients = []
        for b in range(3):
            one.batch.weight = torch.eye(4, dtype=torch.float64)[b]
            use = replace(PUBLISHED, reduces_variance=reduces)
            gradients.append(one.gradients(one.step(use)(one.batch)[0])[path])
        stacked = torch.stack(gradients)
        assert_close(sums[f"gradient_squares{target}"], stacked.square().sum(), rtol=1e-8, atol=0)
        total = sums[f"gradient_total{target}"]
        assert_close(total.square().sum(), stacked.sum(0).square().sum(), rtol=1e-8, atol=0)
        trace = covariance_trace(
            float(sums[f"gradient_squares{target}"]), float(total.square().sum()), 3
        )
        assert trace == pytest.approx(float(stacked.var(0).sum()), rel=1e-7)


def test_measuring_changes_neither_loss_nor_gradient_and_leaves_no_hook():
    world = World(dtype=torch.float32, precision=torch.bfloat16)
    loss, sums = world.step(measure=perceptual)(world.batch)
    expected = world.gradients(loss)
    world.batch.measures = True
    measured, told = world.step(measure=perceptual)(world.batch)
    assert torch.equal(loss, measured)
    assert all(torch.equal(value, told[name]) for name, value in sums.items())
    for name, gradient in world.gradients(measured).items():
        assert torch.equal(gradient, expected[name])
    assert not any(module._forward_pre_hooks for module in world.student.modules())


def test_a_last_map_that_reads_something_else_is_refused():
    """Of a family of one's own; measuring can be switched off."""
    world = World()
    with pytest.raises(BadRecipe, match=r"`proj_out` of flux2 reads \(3, 1, 8\), .*; set it to 0"):
        rows_of_picture(world.student, torch.zeros(3, 1, 8), {}, math.prod(GRID))
