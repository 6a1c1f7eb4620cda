"""What every language model with a loop does in `forward` and in `generate`: embed, prelude, loop, coda, head, loss.

In: token ids, masks, a cache. Out: logits, a loss, the steps each token took. A model gives its own embedding, prelude,
loop, coda and head; everything between is here. Deliberately elsewhere: the models (`loopaware.models`), the loop's
parts, the cache (`loopaware.lm.cache`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from loopaware import tree
from loopaware.lm import loading
from loopaware.lm.cache import LoopCache
from loopaware.lm.exits import Exit, Exits, LastExit, Objective, averaged, token_losses
from loopaware.lm.frame import Attention, altered, current, looped, rerun, settle
from loopaware.lm.policies import Policy
from loopaware.loop import Loop
from loopaware.protocols import Context


@dataclass
class LoopOutput(CausalLMOutputWithPast):
    """What transformers' causal models return, and what the loop did.

    Shapes: steps (B, T) long and halted (B, T) bool, of the tokens of this call; exits (N), the mean loss of each
    step's prediction, if the objective looks at all of them.
    """

    steps: Tensor | None = None
    halted: Tensor | None = None
    exits: Tensor | None = None


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model around a loop. A model inherits from it and gives, besides its config:

    - `loop`: a public `Loop` with rows=2, whose body begins with `attention = context["attention"].at(index)` and hands
      `attention.mask`, `.positions`, `.rotary` and `.cache` to its attention;
    - `lm_head`, and the methods `embed`, `before` (prelude), `behind` (coda and last norm) and, if there are any,
      `rotary`; `masks` if one causal mask does not do;
    - `policy`, which keys and values serve later tokens, and `objective`, the loss of its exits.

    `loop`, `policy` and `objective` may be replaced at any time.
    """

    loop: Loop
    lm_head: nn.Module
    policy: Policy
    objective: Objective = LastExit()

    gradient_checkpointing = False
    accepts_loss_kwargs = True
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers reads a list

    from_pretrained = loading.from_pretrained  # pyright: ignore[reportAssignmentType]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the prelude is given. Shapes: tokens (B, T) long, or embedded (B, T, D); positions (B or 1, T)."""
        raise NotImplementedError(f"{type(self).__name__} must have a method `embed`, got none. Write one.")

    def before(self, x: Tensor, attention: Attention) -> Tensor:
        """The prelude. Shapes: (B, T, D) -> the same."""
        return x

    def behind(self, state: Tensor, attention: Attention) -> Tensor:
        """The coda and the last norm. Shapes: (B, T, D) -> the same."""
        raise NotImplementedError(f"{type(self).__name__} must have a method `behind`, got none. Write one.")

    def rotary(self, x: Tensor, positions: Tensor) -> Any:
        """What attention is given of positions."""
        return None

    def masks(self, x: Tensor, mask: Tensor | None, cache: LoopCache | None, positions: Tensor) -> Any:
        """Masks as the attention interface wants them, one, or one for each kind of layer."""
        return create_masks_for_generate(self.config.get_text_config(), x, mask, cache, positions)

    def predict(self, state: Tensor) -> Tensor:
        """What the model would say if the loop stopped here: the head of halting rules that look at the prediction.

        `model.loop = model.loop.replace(halt=halt.KL(model.predict))`. It runs the coda after every step, with keys and
        values of its own, so that text read in pieces stops where text read at once does.

        Shapes: state (B, T, D) -> (B, T, V).
        """
        return self.lm_head(self.behind(state, current()["attention"].reading()))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LoopCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        max_steps: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> LoopOutput:
        """One pass over new tokens.

        Args:
            attention_mask: True or 1 = real, of past and new tokens; padding may stand on either side.
            position_ids: None counts real tokens.
            past_key_values: what earlier calls returned.
            labels: the tokens themselves; -100 is left out.
            use_cache: None is what the config says, but no in training and with labels.
            logits_to_keep: the last so many positions, or these; 0 is all.
            max_steps: bound of the loop in this call; None is the loop's own.
            num_items_in_batch: what the loss is divided by, in place of the number of labels.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a mask of another length, or a cache under
                gradient checkpointing.
            TypeError: a cache that is no `LoopCache`.
        """
        tokens = one_of(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        kept = use_cache or past_key_values is not None
        if kept and self.gradient_checkpointing and self.training:
            raise ValueError(
                "use_cache must be False where steps are run again for their gradients, got a cache. Leave it out, or "
                "call model.eval()."
            )
        cache = fitting(past_key_values, self.policy)
        if cache is None and (kept or self.shares()):
            cache = LoopCache(self.policy)
        context, outside, real = self.surroundings(tokens, attention_mask, position_ids, cache, kept)
        loop = self.running(labels)
        out = looped(loop, context, real, max_steps)
        if cache is not None and kept and cache.policy.frozen:
            settle(self.loop, out, context, max_steps or self.loop.max_steps, self.predict)
        exits = out.value if isinstance(loop.readout, Exits) else (Exit(out.value, torch.ones(())),)
        logits, loss, by_exit = self.judged(exits, outside, labels, logits_to_keep, num_items_in_batch)
        steps, halted = (by_token(each, context["x"]) for each in (out.steps, out.halted))
        if cache is not None and kept:
            cache.commit(context["attention"].cache.run, steps)
        past = cache if kept else None
        return LoopOutput(loss, logits, past, steps=steps, halted=halted, exits=by_exit)

    def surroundings(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: LoopCache | None, kept: bool
    ) -> tuple[Context, Attention, Tensor | None]:
        """The loop's context, what attention outside the loop is given, and which new tokens are real."""
        past = 0 if cache is None else cache.length
        real = real_tokens(mask, tokens, past)
        positions = counted(mask, tokens, past) if positions is None else positions
        x = self.embed(tokens, positions)
        view = None if cache is None else cache.view(x.shape[1], len(x))
        masks = self.masks(x, mask, cache if past else None, positions)
        attention = Attention(masks, positions, self.rotary(x, positions), view)
        outside = attention if kept else replace(attention, cache=None)
        return {"x": self.before(x, outside), "attention": attention}, outside, real

    def shares(self) -> bool:
        """Whether the policy says anything although nothing is kept.

        It does where all steps share a slot, or where tokens of a sequence stop apart: not if the loop halts sequences,
        nor if the rule says that its `axes` are no more (`halt.Drawn`). Then keys and values of all steps are held
        while the loop is differentiated, also where steps are run again to save memory.
        """
        rule = getattr(self.loop.halt, "now", self.loop.halt)
        apart = self.loop.rows > 1 and rule.stops and getattr(rule, "axes", 2) > 1
        return not self.policy.frozen and (apart or self.policy.slots(2) == 1)

    def running(self, labels: Tensor | None) -> Loop:
        """The loop as this call runs it."""
        readout = Exits() if labels is not None and self.objective.every else None
        grad = rerun(self.loop.grad) if self.gradient_checkpointing and self.training else None
        return altered(self.loop, readout=readout, grad=grad)

    def judged(
        self,
        exits: tuple[Exit, ...],
        outside: Attention,
        labels: Tensor | None,
        keep: int | Tensor,
        items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of the last state, and with labels the loss and each exit's own."""
        chosen = slice(-keep, None) if isinstance(keep, int) else keep
        if labels is None:
            return self.lm_head(self.behind(exits[-1].state, outside)[:, chosen]), None, None
        losses, logits = [], None
        for exit_ in exits:
            logits = self.lm_head(self.behind(exit_.state, outside))
            losses.append(token_losses(logits, labels.to(logits.device)))
        assert logits is not None
        weights = torch.stack([by_token(exit_.weight, logits) for exit_ in exits])
        loss = averaged(self.objective(torch.stack(losses), weights), labels, items)
        by_exit = torch.stack([averaged(each.detach(), labels, None) for each in losses])
        return logits[:, chosen], loss, by_exit if self.objective.every else None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Let `generate` begin with a cache of this model's policy."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be None for a model with a loop, got "
                f"{generation_config.cache_implementation!r}. Pass past_key_values=LoopCache(policy) for another cache."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LoopCache(self.policy)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Layers outside the loop as transformers does it; in the loop steps are run again, not layers."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for module in self.loop.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = enable


def one_of(tokens: Tensor | None, embedded: Tensor | None) -> Tensor:
    """The one that is given."""
    if (tokens is None) == (embedded is None):
        raise ValueError(
            f"exactly one of input_ids and inputs_embeds must be given, got {'none' if tokens is None else 'both'}. "
            "Pass token ids, or what the embedding makes of them."
        )
    return embedded if tokens is None else tokens  # pyright: ignore[reportReturnType]


def fitting(cache: Any, policy: Policy) -> LoopCache | None:
    """A cache that has a slot for each step."""
    if cache is None or isinstance(cache, LoopCache):
        return cache
    raise TypeError(
        f"past_key_values must be a LoopCache, got {type(cache).__name__}. A model with a loop has keys and values for "
        f"each step: pass loopaware.lm.LoopCache({policy})."
    )


def real_tokens(mask: Tensor | None, tokens: Tensor, past: int) -> Tensor | None:
    """Which new tokens are real. Shapes: mask (B, past + T) -> (B, T) bool; None is all."""
    if mask is None or mask.ndim != 2:
        return None
    if mask.shape[1] != past + tokens.shape[1]:
        raise ValueError(
            f"attention_mask must cover {past} past and {tokens.shape[1]} new tokens, got {mask.shape[1]}. Append the "
            "new tokens' mask to that of the past."
        )
    return mask[:, past:].bool()


def counted(mask: Tensor | None, tokens: Tensor, past: int) -> Tensor:
    """Positions that count real tokens. Shapes: -> (B or 1, T) long."""
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


def by_token(rows: Tensor, like: Tensor) -> Tensor:
    """A number for each token. Shapes: rows (B, T), (B) or () -> (B, T)."""
    return tree.expand(rows, like[..., 0]).expand(like.shape[:2])
