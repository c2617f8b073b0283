"""DeepSpeed behind four verbs: forward, backward, step, state. The only module that imports it."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ask_dist.config import Optimization
from ask_dist.models.lora import adapted, merged
from ask_dist.train.parameters import encoders, largest, parameter_groups
from ask_dist.train.precision import compute_in
from ask_dist.train.recompute import recompute_blocks

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"  # of the weights; kept beside Adam's moments, and in parts over the ranks as they are
REDUCED_AT_ONCE = 500_000_000  # elements, DeepSpeed's own default


def learning_rate(optimization: Optimization, global_step: int, total_steps: int) -> float:
    """Linear warm-up, then a half cosine down to a hundredth: a function of the step, so there is nothing to save."""
    warmup = max(1, round(optimization.warmup_share * total_steps))
    if global_step < warmup:
        return optimization.learning_rate * (global_step + 1) / warmup
    done = (global_step - warmup) / max(1, total_steps - warmup)
    return optimization.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


@dataclass(frozen=True)
class StepResult:
    """Outcome of `Engine.step`: the rate used, the global gradient norm before clipping, and whether the weights moved.

    They do not where a gradient of any rank is not finite; the norm is not finite then either.
    """

    learning_rate: float
    gradient_norm: float
    updated: bool


class Engine:
    """A model under DeepSpeed data parallelism; needs torch.distributed initialised (Ray Train does that).

    Args:
        model: the module to train; moved to `device`.
        optimization: rates, clipping, ZeRO stage, precision, offload.
        total_steps: length of the run, for the schedule.
        device: where this rank computes.
    """

    def __init__(self, model: nn.Module, optimization: Optimization, total_steps: int, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if device.type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce at first use (38 s, and a compiler that a plain
            # machine may lack); gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.optimization = optimization
        self.total_steps = total_steps
        self._thawing = {name: encoder for name, encoder in encoders(model).items() if encoder.thaws_at > 0.0}
        self._averaged = optimization.ema_decay is not None
        self._kept = (*MOMENTS, AVERAGE) if self._averaged else MOMENTS
        self.global_step = 0
        self.device = device
        apart = optimization.zero_stage == 3 or self._averaged or adapted(model)
        self._copy = copy.deepcopy(model).cpu() if apart else None
        if optimization.activation_checkpointing:
            recompute_blocks(model)
        compute_in(model, optimization.precision, device)
        groups = parameter_groups(model, optimization.weight_decay, optimization.layer_decay)
        trained = sum(weights.numel() for group in groups for weights in group["params"])
        on_host = device.type == "cpu" or optimization.offload != "none"
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=torch.optim.AdamW(
                groups,
                lr=optimization.learning_rate,
                betas=(0.9, 0.98),
                eps=1e-6,
                fused=on_host or None,  # several passes over the weights in one; GPUs do well by default
            ),
            config=_deepspeed_config(optimization, trained),
            dist_init_required=False,
        )
        self._largest = largest(self.module)
        self._create_moments()
        self._scaler = _loss_scaler() if optimization.precision == "fp16" else None

    @property
    def global_step(self) -> int:
        """Steps that lie behind, those that were skipped too. Encoders that are frozen until a step follow it."""
        return self._global_step

    @global_step.setter
    def global_step(self, step: int) -> None:
        self._global_step = step
        for encoder in self._thawing.values():
            encoder.advance(step / self.total_steps)

    @property
    def module(self) -> nn.Module:
        """The model as it is trained; under ZeRO 3 its weights lie in parts on all ranks."""
        return self.deepspeed.module

    def whole(self) -> nn.Module:
        """The model with every weight on this rank, for evaluation and export. A collective.

        With `ema_decay` it has the average of the weights; adapters are merged into them.
        Under ZeRO 3 it is a copy: the trained model collects its weights layer by layer from all ranks, which would
        wait for ever on ranks that have fewer batches to evaluate. It lies on the device while the caller holds it.
        """
        if self._copy is None:
            return self.module
        with torch.no_grad():
            for ours, trained in zip(self._copy.parameters(), self.module.parameters(), strict=True):
                ours.copy_(self._full(trained, AVERAGE if self._averaged and trained.requires_grad else None))
            for buffer, current in zip(self._copy.buffers(), self.module.buffers(), strict=True):
                buffer.copy_(current)
        model = merged(self._copy)
        return model if self.device.type == "cpu" else copy.deepcopy(model).to(self.device)

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass through the engine, so that its hooks run."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward pass and reduction of the gradients over ranks (mean); those of a step's losses add up.

        Args:
            loss: of a forward pass through the engine.
            last: no other follows before `step`.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(self._scaled(loss), scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clips, updates, and advances global_step. Gradients that are not finite are dropped on all ranks alike."""
        rate = learning_rate(self.optimization, self.global_step, self.total_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = 0.0 if self._is_held(group) else rate * group["scale"]
        norm, updated = self._update()
        if self._scaler is not None:
            self._scaler.update_scale(not updated)
        if updated:
            self._follow_update()
        self.global_step += 1
        return StepResult(rate, norm, updated)

    def _update(self) -> tuple[float, bool]:
        """DeepSpeed's step: the global gradient norm, and whether it was finite and the step therefore taken."""
        if self.optimization.zero_stage > 0:
            self.deepspeed.step()
            updated = not self.deepspeed.optimizer.overflow
            return float(self.deepspeed.get_global_grad_norm()) if updated else math.inf, updated
        # Without ZeRO DeepSpeed has the reduced gradients whole on every rank, and looks at none of them.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._scaler is not None:
            torch._foreach_div_(gradients, self._scaler.loss_scale)
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.deepspeed.zero_grad()
            return math.inf, False
        self.deepspeed.step()
        return norm, True

    def _scaled(self, loss: Tensor) -> Tensor:
        """In fp16 the loss times its scale. Under ZeRO DeepSpeed multiplies it, and divides the gradients; not by a
        scaler of its own, which doubles the scale before it divides gradients of the old one."""
        if self._scaler is None:
            return loss
        if self.optimization.zero_stage == 0:
            return self._scaler.scale_loss(loss)
        self.deepspeed.optimizer.override_loss_scale(self._scaler.loss_scale)
        return loss

    def skip(self) -> None:
        """Advances global_step without an update; all ranks must skip together."""
        self.global_step += 1

    def state(self) -> dict[str, Tensor]:
        """Weights, their average and Adam's moments, whole and in fp32, by parameter name: independent of world_size,
        ZeRO stage, precision and offload. In fp16 the loss scale too, with the steps since an overflow.

        A collective: every rank must call it; every rank gets the same tensors, on the CPU.
        """
        state = {"global_step": torch.tensor(self.global_step), "updates": torch.tensor(self._updates())}
        state |= {f"updates.{name}": torch.tensor(self._updates(name)) for name in self._thawing}
        if self._scaler is not None:
            steps = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
            state |= {"loss_scale": torch.tensor(self._scaler.loss_scale), "loss_scale.steps": torch.tensor(steps)}
        for name, parameter in self.module.named_parameters():
            state[f"model.{name}"] = self._full(parameter, None)
            for moment in self._kept if parameter.requires_grad else ():
                state[f"{moment}.{name}"] = self._full(parameter, moment)
        for name, buffer in self.module.named_buffers():
            state[f"buffer.{name}"] = buffer.detach().cpu().clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave, on any world_size and ZeRO stage, in any precision and with any offload. A
        collective."""
        from deepspeed.runtime.zero import GatheredParameters

        self.global_step = int(state["global_step"])
        for name, parameter in self.module.named_parameters():
            # The copy that the forward pass reads lies beside the optimizer's: whole in ZeRO 1 and 2, partitioned in 3.
            with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(state[f"model.{name}"])
            if parameter.requires_grad:
                self._set_full(parameter, None, state[f"model.{name}"])
                for moment in self._kept:  # an average that the run did not have begins with the weights
                    self._set_full(parameter, moment, state.get(f"{moment}.{name}", state[f"model.{name}"]))
        if self.optimization.zero_stage == 3:  # a tower that is frozen again has no gradient to write over its last one
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        for group, master in self._masters():
            updates = state.get(f"updates.{group['tower']}", state["updates"])
            self._optimizer().state[master]["step"] = updates.float().clone()
            if master.grad is not None:  # on the host it is kept between steps
                master.grad.zero_()
        if self._scaler is not None and "loss_scale" in state:
            self._scaler.cur_scale = float(state["loss_scale"])
            self._scaler.cur_iter = int(state["loss_scale.steps"])
            self._scaler.last_overflow_iter = -1
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])

    def _create_moments(self) -> None:
        """Adam's moments, and the average, from the start, reachable by parameter.

        DeepSpeed creates them in the first step and, with ZeRO 1 and 2, links those of the first parameter group only
        (0.19.8 links after that group's step, when the others have none yet).
        """
        inner, outer = self._optimizer(), self.deepspeed.optimizer
        for _, master in self._masters():
            if not inner.state[master]:
                zeros = {moment: torch.zeros_like(master) for moment in MOMENTS}
                inner.state[master] = {"step": torch.tensor(0.0), **zeros}
            if self._averaged:
                inner.state[master][AVERAGE] = master.detach().clone()
        if self.optimization.zero_stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for weights, flat in zip(outer.bit16_groups, outer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, flat, inner.state)
            outer._hp_optimizer_states_linked = True

    def _masters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The tensors that AdamW updates on this rank, each with its group: parameters, or flat parts of several."""
        groups, outer = self._optimizer().param_groups, self.deepspeed.optimizer
        if self.optimization.zero_stage == 3:  # the groups are empty between steps
            owners = outer.sub_group_to_group_id
            return [(groups[owners[i]], part) for i, part in enumerate(outer.fp32_partitioned_groups_flat)]
        return [(group, part) for group in groups for part in group["params"]]

    def _is_held(self, group: dict[str, Any]) -> bool:
        return group["tower"] is not None and self._thawing[group["tower"]].held

    @torch.no_grad()
    def _follow_update(self) -> None:
        """Parameters go no further than they may. Adam's count stays at 0 for a frozen tower, so that its bias
        correction begins when the tower learns; the moments do by themselves, since it has no gradient. Then the
        average follows the weights."""
        for parameter, most in self._largest.items():
            self._clamp(parameter, most)
        state, masters = self._optimizer().state, self._masters()
        for group, master in masters:
            if self._is_held(group):
                state[master]["step"].zero_()
        if self.optimization.ema_decay is not None:
            weights = [master for _, master in masters]
            averages = [state[master][AVERAGE] for master in weights]
            torch._foreach_lerp_(averages, weights, 1.0 - self.optimization.ema_decay)

    def _clamp(self, parameter: nn.Parameter, most: float) -> None:
        """Clamps what the forward pass reads, and the optimizer's fp32 copy; of both this rank its own part."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        parameter.data.clamp_(max=most)  # empty in ZeRO 3, unless it is put together at the moment
        if hasattr(parameter, "ds_id"):
            parameter.ds_tensor.data.clamp_(max=most)  # type: ignore[attr-defined]
            safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(max=most))
        elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO 1 and 2, where this rank has a part
            parameter._hp_mapping.get_hp_fragment().data.clamp_(max=most)  # type: ignore[attr-defined]

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The optimizer's fp32 copy of a parameter (of a frozen one the weights), or one of its moments."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is not None:
            full = safe_get_full_optimizer_state(parameter, moment)
            if full is None:  # ZeRO 0: nothing is partitioned
                full = self._optimizer().state[parameter][moment]
        else:
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is None:
                with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    full = parameter.detach().clone()
        return full.detach().float().cpu().clone().contiguous()

    def _set_full(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Writes what `_full` gave; each rank keeps its part."""
        from deepspeed import utils

        value = value.to(self.device)
        if hasattr(parameter, "ds_id"):
            # DeepSpeed 0.19.8 sets no whole tensor that the ranks can't share evenly, so each sets its padded part.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            part = padded.narrow(0, size * dist.get_rank(), size)
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
        elif moment is not None and not hasattr(parameter, "_hp_mapping"):  # ZeRO 0
            self._optimizer().state[parameter][moment].copy_(value)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside DeepSpeed's wrappers."""
        optimizer = self.deepspeed.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _updates(self, tower: str | None = None) -> int:
        """Adam's own step count, for its bias correction; steps that were skipped do not count.

        Of all parameters but those of towers that are frozen until a step, or of one of these.
        """
        state = self._optimizer().state
        return max((int(state[part]["step"]) for group, part in self._masters() if group["tower"] == tower), default=0)


def _loss_scaler() -> Any:
    """DeepSpeed's rule with the numbers of torch's GradScaler: from 2^16 down by half at each overflow, to 1 at least,
    and up by 2 after 2000 steps without one."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=2000,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )


def _deepspeed_config(optimization: Optimization, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings for a model with so many trained elements."""
    # A buffer of this many elements is held however small the model is.
    bucket = max(1, min(REDUCED_AT_ONCE, trained))
    zero: dict[str, Any] = {"stage": optimization.zero_stage, "overlap_comm": False, "reduce_bucket_size": bucket}
    if optimization.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if optimization.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": optimization.micro_batch_size,
        "gradient_clipping": optimization.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's AdamW of the host is compiled at first use; torch's does
        "steps_per_print": 10**9,
    }
