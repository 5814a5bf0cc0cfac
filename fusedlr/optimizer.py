"""FusedOptimizer: what all optimizers share. A step gathers, and hands the rest to a backend's three verbs."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from . import capture, checkpoint, live, registration, scaling
from .backends import Backend, Executor, Knobs, check_one_executor, choose_backend, executors_for
from .clipping import Clip
from .clipping.fixed import as_clip
from .clipping.records import Records
from .gather import Plan, check_gradients
from .groups import ScheduleArg, Scheduled, scalars_at
from .precision import Precision, as_precision
from .rule import Rule
from .state import Bank, Leaf, Mark, drop_replaced, ensure_state, watched

if TYPE_CHECKING:
    from .integrations.lr_scheduler import FusedLRScheduler

__all__ = ["FusedOptimizer", "ParamsT", "ScheduleArg"]

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_NONFINITE = ("propagate", "skip", "raise")
_grad = attrgetter("grad")
_names = attrgetter("scalars")
_maximize = itemgetter("maximize")


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers: param groups, schedules, clipping, flat state and the step.

    A subclass names the class of torch.optim whose arguments and validation it has (``_namesake``), or validates its
    arguments itself (``_validated``), and the rule of a param group (``_rule``).
    """

    _namesake: ClassVar[type[torch.optim.Optimizer]]
    grad_divisor = scaling.grad_divisor
    fold_grad_scale = scaling.fold_grad_scale

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        schedule: ScheduleArg,
        clip: Clip | float | None,
        nonfinite: str,
        precision: Precision | None,
        flatten: bool,
        backend: str,
        norm_group: None,
    ) -> None:
        if defaults.get("differentiable"):
            raise ValueError("differentiable=True is not possible here: the fused step is not recorded by autograd; "
                             "use the optimizer of the same name in torch.optim")  # fmt: skip
        if nonfinite not in _NONFINITE:
            raise ValueError(f"nonfinite must be one of {_NONFINITE}, but got {nonfinite!r}")
        if norm_group is not None:
            raise ValueError(f"norm_group must be None in this version of fusedlr, but got {norm_group!r}")
        self._precision = as_precision(precision)
        self._clip = as_clip(clip)
        self._nonfinite = nonfinite
        self._flatten = bool(flatten)
        self._backend: Backend = choose_backend(backend)
        self._grad_divisor: Any = scaling.UNSCALED.divisor
        self._step_supports_amp_scaling = False
        self._reset()
        defaults = {**self._checked(defaults), "schedule": schedule, "clip": self._clip, "norm_group": None}
        super().__init__(params, defaults)
        registration.register(self)
        self._watch_state()

    def _reset(self) -> None:
        """The attributes of an optimizer that has taken no step."""
        self._t = 0
        self._leaves: list[Leaf] = []
        self._params: list[Tensor] = []
        self._sizes: list[int] = []  # of the groups that are registered, ...
        self._registered: list[Any] = []  # ... which are these, with their schedules, clips and parameters
        self._marks: list[dict[str, Any]] = []  # and what fusedlr keeps in them
        self._schedules: list[list[Scheduled]] = []
        self._timed: list[tuple[Scheduled, live.Timed]] = []
        self._max_norm_schedule: Any = None
        self._rules: list[Rule] = []
        self._plan: Plan | None = None
        self._mark = Mark()
        self._watched: Any = None
        self._grad_norm: Tensor | None = None
        self._clocks: dict[torch.device, Tensor] = {}
        self._skipped_before = 0
        self._records = Records(self._clip)
        self._may_skip = self._nonfinite == "skip"
        self._last_lr: list[Any] = []
        self._loading: Mapping[str, Any] | None = None  # the checkpoint that is being loaded
        # Who took the captured steps, and what their graphs hold the addresses of.
        self._captured: list[tuple[Executor, list[Any]]] = []
        self._replayed: capture.ReplayedClock | None = None

    @abstractmethod
    def _rule(self, group: dict[str, Any]) -> Rule:
        """The rule that a param group's flags ask for."""

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments, after a check of each."""
        betas = values.get("betas")
        two = betas is None or (hasattr(betas, "__len__") and len(betas) == 2)
        try:
            validated = cls._validated(values)
        except (IndexError, TypeError):
            if two:
                raise
        if not two:  # torch reads the first two, or says that an index is out of range
            raise ValueError(f"betas must be two numbers, but got {betas!r}")
        return validated

    @classmethod
    def _validated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """torch's own defaults for these arguments: its constructor raises exactly what torch.optim raises.

        An argument that the installed torch does not have yet is kept as it is.
        """
        accepted = inspect.signature(cls._namesake).parameters
        oracle = cls._namesake([torch.zeros(1)], **{k: v for k, v in values.items() if k in accepted})
        return {**values, **oracle.defaults}

    # ---- what a user reads -------------------------------------------------------------------------------------

    @property
    def clip(self) -> Clip | None:
        """The clipping strategy, or None."""
        return self._clip

    @property
    def last_lr(self) -> list[float]:
        """The lr of the last step, one float a param group, from the host's own evaluation (no wait for a device)."""
        capture.follow(self)
        added = self.param_groups[len(self._last_lr) :]  # since the last step, or since the start
        return [float(lr) for lr in (*self._last_lr, *(group["lr"] for group in added))]

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global norm before clipping of the last step: a 0-dim float32 device tensor that each step rewrites.

        None for strategies that measure no norm and without clipping; NaN before the first step.
        """
        if self._clip is None or self._clip.scope is None:
            return None
        if self._grad_norm is None:
            self._grad_norm = torch.full((), float("nan"), dtype=torch.float32, device=self._device())
        return self._grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``nonfinite="skip"`` or a scaler's ``found_inf`` skipped: a 0-dim int64 device tensor."""
        return self._clock(self._device())[1]

    @property
    def steps_taken(self) -> int:
        """The clock t, as far as the host knows: steps taken, those skipped not counted."""
        capture.follow(self)
        return self._t

    def _device(self) -> torch.device:
        return next((leaf.device for leaf in self._leaves), torch.device("cpu"))

    def lr_scheduler(self) -> FusedLRScheduler:
        """A ``torch.optim.lr_scheduler.LRScheduler`` for frameworks that insist on one; its ``step()`` only counts."""
        from .integrations.lr_scheduler import FusedLRScheduler

        return FusedLRScheduler(self)

    def next_lr(self) -> list[float]:
        """The lr that the next step will use, one float a param group."""
        capture.follow(self)
        registration.refresh(self)
        return [float(values["lr"]) for values in self._scalars()[0]]

    @torch.no_grad()
    def report(self, metric: float | Tensor) -> None:
        """Tell a ``Plateau`` the metric it follows, a number or a 0-dim tensor; a GPU is not waited for.

        Raises:
            TypeError: the metric is no real number.
            ValueError: no schedule of this optimizer is or holds a ``Plateau``.
        """
        registration.refresh(self)
        live.report(self, metric)

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("\n")
        where = self._backend.explain(sorted({leaf.device.type for leaf in self._leaves}))
        own = f"backend: {where}; clip: {self._clip}; nonfinite: {self._nonfinite}"
        precision = "" if self._precision == Precision() else f"precision: {self._precision}\n"
        return f"{head}\n{own}\n{precision}{rest}"

    # ---- registration ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; it may have its own hyper-parameters and ``schedule``, and shares the clock.

        Raises:
            ValueError: for a hyper-parameter outside its range, a complex parameter, or a ``clip`` of its own.
        """
        if isinstance(param_group, dict):
            registration.check_group(self, param_group)
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            registration.prepare_group(self, before)
            if self._leaves:
                registration.register(self)
        except BaseException:
            del self.param_groups[before:]
            raise

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: norm, clip, lr and update, without waiting for a device.

        Where no parameter has a gradient there is nothing to take: the clock and the schedules stand still.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim.

        Raises:
            ValueError: for a gradient that does not fit its parameter, or a schedule that takes a beta out of [0, 1);
                nothing has changed then.
            FloatingPointError: with ``nonfinite="raise"``, for an inf or NaN; nothing has changed then.
        """
        if is_dynamo_compiling():  # never true but where torch.compile traces this, whose graph ends here
            return _step_outside_graphs(self, closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
            or profiler._is_profiler_enabled  # to ask C++ takes 3 us; the deprecated profiler_legacy does not set it
        ):
            return _hooked_step(self) if closure is None else _hooked_step(self, closure)
        return self._step(closure)

    # torch.optim would wrap every step in what hooks and profilers need: 13 us, of the 60 that a small model takes.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._take_step()
        finally:
            torch._C._set_grad_enabled(enabled)
        return loss

    def _take_step(self) -> None:
        scale = scaling.scale_of(self)
        plan, grads, banks = self._gather()
        if not grads:
            return
        if self._captured:
            capture.follow(self)
        captures = False
        for executor in plan.executors:
            arrived = None if self._captured else executor.arrived_clock()
            self._t = self._t if arrived is None else arrived
            captures = captures or executor.captures()
        if captures:
            capture.check_captured(self, plan)
        try:
            advance = not checkpoint.is_hidden_step(self, banks)
            if advance and self._timed:
                live.tick(self._timed, self._t)
            scalars, driven = self._scalars(self._rules)
            for g in plan.groups:
                for s in driven[g]:
                    s.check(scalars[g][s.name], self._t)
            knobs = Knobs(
                scalars=scalars,
                maximize=list(map(bool, map(_maximize, self.param_groups))),
                driven=driven,
                scheduled=any(self._schedules),
                max_norm_schedule=self._max_norm_schedule,
                t=self._t,
                clip=self._clip,
                clip_numbers=self._clip_numbers(),
                scale=scale,
                nonfinite=self._nonfinite,
                may_skip=self._may_skip,
                advance=advance,
                grad_norm=self.last_grad_norm,
                clock=self._clock,
                records=self._records,
            )
            skipped = plan.run(grads, knobs)
        except (ArithmeticError, LookupError, TypeError, ValueError, capture.CaptureError):
            # Nothing was written yet.
            for bank in banks:
                bank.move_out(self.state)
            self._plan = None
            raise
        for bank in banks:
            bank.settle()
        if captures:  # nothing has run: that the clock and the lr move will be heard of the replays
            self._captured += [(executor, executor.hand_over()) for executor in plan.executors]
        if self._captured and self._replayed is not None:
            self._replayed.record(self._clock(self._device()), captures)
        if not skipped and not captures:
            self._show(scalars, driven)
            self._t += knobs.advance

    def _gather(self) -> tuple[Plan, list[Tensor], list[Bank]]:
        """The active parameters, their gradients, and state for all of them; everything that can fail fails here."""
        registration.refresh(self)
        params = self._params
        rules = list(map(self._rule, self.param_groups))
        grads: list[Any] = list(map(_grad, params))
        ptrs = list(map(Tensor.data_ptr, params))
        plan = self._plan
        touched = self._mark.set or self.state is not self._watched
        if plan is not None and plan.ptrs == ptrs and not touched and all(map(is_, rules, self._rules)):
            if plan.all_active:
                if plan.same_layout(grads):
                    return plan, grads, []
            elif plan.active == [g is not None for g in grads]:
                present = [g for g in grads if g is not None]
                if plan.same_layout(present):
                    return plan, present, []
        active = [g is not None for g in grads]
        present = [g for g in grads if g is not None]
        kept = plan is not None and plan.active == active and plan.ptrs == ptrs and not touched
        # Where a gradient lies otherwise, its parameter may have become another view of the same memory.
        if plan is not None and kept and rules == self._rules and plan.still_fits(present):
            plan.layout(present)
            return plan, present, []
        return self._replan(rules, active, ptrs, present)

    def _replan(
        self, rules: list[Rule], active: list[bool], ptrs: list[int], grads: list[Tensor]
    ) -> tuple[Plan, list[Tensor], list[Bank]]:
        capture.check_planned(self._leaves)
        self._plan = None
        for leaf in self._leaves:
            if leaf.moved():
                leaf.locate()
        leaves = [leaf for leaf, is_active in zip(self._leaves, active, strict=True) if is_active]
        check_gradients(leaves, grads)
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad_dtype = g.dtype
        executors = executors_for(self._backend, leaves)
        guards = self._nonfinite != "propagate" or self._may_skip
        check_one_executor(executors, guards or (self._clip is not None and self._clip.scope is not None))
        drop_replaced(self._leaves, rules, self.state)
        banks = ensure_state(leaves, rules, self.state)
        began = self._t or self._last_lr  # the hidden step of torch's distributed checkpoints does not count, but shows
        if not began and (brought := checkpoint.steps_brought(banks)):
            self._t = brought
            for clock in self._clocks.values():
                clock[0].fill_(brought)
        plan = Plan(leaves, active, ptrs, executors)
        for executor in executors:
            executor.prepare(rules)
        plan.layout(grads)
        if self._replayed is None and self._device().type == "cuda":
            self._replayed = capture.ReplayedClock(self._device())
        self._rules = rules
        self._plan = plan
        self._watch_state()
        return plan, grads, banks

    def _clock(self, device: torch.device) -> Tensor:
        """The int64 tensor (t, skipped steps, eager steps since a capture) of a device."""
        if device not in self._clocks:
            # Filled on the device: a copy from ordinary memory would wait for it.
            clock = self._clocks[device] = torch.zeros(3, dtype=torch.int64, device=device)
            clock[0].fill_(self._t)
            clock[1].fill_(self._skipped_before)
        return self._clocks[device]

    def _scalars(self, rules: list[Rule] | None = None) -> tuple[list[dict[str, Any]], list[list[Scheduled]]]:
        names = list(map(_names, rules or map(self._rule, self.param_groups)))
        return scalars_at(self._t, self.param_groups, names, self._schedules)

    def _clip_numbers(self) -> tuple[float, float, float]:
        if self._clip is None:
            return float("inf"), 0.0, float("inf")
        max_norm, eps, limit = self._clip.numbers
        if self._max_norm_schedule is not None:
            max_norm = self._max_norm_schedule(self._t, max_norm)
        return max_norm, eps, limit

    def _show(self, scalars: list[dict[str, Any]], driven: list[list[Scheduled]]) -> None:
        self._last_lr = []
        for values, mine in zip(scalars, driven, strict=True):
            for s in mine:
                s.show(values[s.name])
            lr = values["lr"]
            # A tensor may be filled before somebody asks. That of a GPU is not copied: it would be one launch more.
            self._last_lr.append(lr.clone() if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr)

    # ---- state that others touch -------------------------------------------------------------------------------

    def _watch_state(self) -> None:
        """Learn from now on when somebody puts other dicts or tensors into ``self.state``."""
        self._watched = watched(self.state, self._mark)
        self.state = self._watched

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self, *, format: str = "fusedlr") -> dict[str, Any]:
        """The state under torch's keys; fusedlr's own keys are additional and plain data.

        Args:
            format: "fusedlr", every array as it is stored; or "torch", what torch.optim can load: 8-bit state decoded
                to float32, scales and further bits of the weights left out.
        """
        registration.refresh(self)
        # Before the hooks of others, which may return whatever they like.
        hook = self.register_state_dict_post_hook(lambda _, saved: checkpoint.save(self, saved, format), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @torch.no_grad()
    def full_precision_parameters(self) -> dict[Tensor, Tensor]:
        """The float32 weights, for export: parameter to tensor, in the order of the param groups.

        With ``precision`` a weight may have more bits than its parameter. A parameter that somebody has written since
        the last step counts as it is. ``{name: full[p] for name, p in model.named_parameters()}`` names them.
        """
        registration.refresh(self)
        return checkpoint.full_precision(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of fusedlr or of the class of the same name in torch.optim.

        Schedules, clipping and backend stay those of this optimizer; the clock t comes from the checkpoint, or from
        the largest ``step`` in it where torch saved it.

        Raises:
            ValueError: for a checkpoint of other parameters; nothing has changed then.
        """
        # After the hooks of others, which may hand on another state_dict; torch then calls __setstate__, and their
        # hooks that follow find everything loaded.
        hook = self.register_load_state_dict_pre_hook(checkpoint.begin)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **checkpoint.own_state(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = checkpoint.take_own_state(state)
        if own is not None:
            super().__setstate__(state)
            checkpoint.revive(self, own)
        else:
            groups, loading = self.param_groups, self._loading
            super().__setstate__(state)
            if loading is not None:
                checkpoint.restore(self, groups, loading)


# The step as torch.optim wraps it, for whoever has registered hooks or records a profile.
_hooked_step = torch.optim.Optimizer.profile_hook_step(FusedOptimizer._step)
# The step where torch.compile is at work: run as it is, with nothing in it traced, so that nothing in it recompiles.
_step_outside_graphs = _disable_dynamo(FusedOptimizer.step)

