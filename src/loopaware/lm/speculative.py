"""Self-speculative decoding: the model drafts with few steps of its loop and verifies with all of them.

In: what `generate` hands to a way of decoding. Out: tokens, distributed as without drafts, in fewer passes one after
the other. Deliberately elsewhere: which drafts are kept (`loopaware.lm.rejection`), one pass (`loopaware.lm.model`),
and what `generate` prepares, which is transformers'; drafts by another model, for which it takes an `assistant_model`.

A round: the newest token and each draft take the first steps alone, one after the other; then all of them go on
together from the states they have reached. States and keys of a step depend on earlier tokens at earlier steps only,
so what was drafted is the first part of what verifies it, and no step of a token is run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from loopaware import tree
from loopaware.checks import bounded
from loopaware.lm.cache import LoopCache, Pass, View
from loopaware.lm.frame import Attention, looped, settle
from loopaware.lm.model import RecurrentForCausalLM, by_token
from loopaware.lm.rejection import Sampling
from loopaware.protocols import Carry, Context, Output


class Speculated(NamedTuple):
    """What speculative decoding did after the prompt, over all sequences.

    `tokens` were generated in `rounds`; of `drafted` tokens `accepted` were kept. `passes` counts runs of the loop's
    body one after the other, of which plain decoding takes N for each token of the longest sequence; `ran` counts steps
    of tokens, those of refused drafts included, of which it takes N for each token.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    ran: int = 0

    @property
    def share(self) -> float:
        """Accepted drafts of all."""
        return self.accepted / max(self.drafted, 1)


@dataclass(frozen=True)
class Speculative:
    """Draft k tokens with d steps each, verify them with all N at once: `generate(custom_generate=Speculative())`.

    A draft x, drawn from q, is kept with the chance min(1, p(x) / q(x)); the first that is not is drawn anew from
    (p - q)_+, normalised, and a last token from p where all are kept. So each token is distributed as p, the prediction
    after N steps, whatever q is; greedy decoding gives the same tokens. Everything that `generate` offers for greedy
    decoding and sampling holds: temperature, top-p and other processors, stopping criteria, eos, padding.

    A round costs k d + N passes through the loop one after the other, for 1 to k + 1 tokens; plain decoding N for each
    token. Work is not saved: each token that is run takes its N steps, once; a refused draft wastes them. Take it where
    a pass takes as long for k + 1 tokens as for one, as where weights are moved or the model is small, and where few
    steps often predict what all do. In a batch each sequence keeps its own number of tokens; places that it does not
    keep and another does stay in its cache, masked. Where layers look through a window, which counts places, all keep
    as many as the one that keeps fewest.

    Args:
        draft_steps: d, below the number of steps of the model or the call.
        tokens_ahead: k.
        report: called at the end with a `Speculated`.

    Raises:
        ValueError: a number is below one; or, when it runs, drafts with no fewer steps than the model takes, a policy
            that is not exact, or an option of `generate` that it has not.

    References: Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative Decoding", 2023,
    arXiv 2211.17192; C. Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023,
    arXiv 2302.01318; J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171
    (drafts by fewer steps, whose states can be gone on from).

    >>> from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM
    >>> base = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 3}
    >>> model = LoopedForCausalLM(LoopedConfig(base=base, prelude=1, core=1, coda=1, steps=5)).eval()
    >>> prompt, more = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    >>> drafted = model.generate(prompt, custom_generate=Speculative(draft_steps=2), **more)
    >>> torch.equal(drafted, model.generate(prompt, **more))
    True
    """

    draft_steps: int = 1
    tokens_ahead: int = 4
    report: Callable[[Speculated], None] | None = field(default=None, repr=False)

    def __post_init__(self):
        bounded("draft_steps", self.draft_steps, "Drafts are made by the loop.")
        bounded("tokens_ahead", self.tokens_ahead, "Without a draft, leave custom_generate out.")

    def _decode(
        self,
        model: RecurrentForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # transformers' protocol: what had a name here would be taken from the model
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate. Shapes: input_ids (B, T) long -> (B, T + new), shorter ones filled up."""
        steps = model_kwargs.get("max_steps") or model.loop.max_steps
        fitting(self, model, steps, generation_config, model_kwargs)
        alone(logits_processor, len(input_ids))
        sampling = Sampling(logits_processor, bool(generation_config.do_sample))
        run = Decoding(model, sampling, self.draft_steps, steps, input_ids, model_kwargs)
        longest = generation_config.max_length
        while active := run.active:
            room = longest - min(run.texts[row].shape[1] for row in active)
            run.round(max(0, min(self.tokens_ahead, room - 1)), stopping_criteria)
        if self.report is not None:
            self.report(run.done)
        filler = generation_config._pad_token_tensor
        whole = pad_sequence([text[0] for text in run.texts], True, 0 if filler is None else filler.item())
        run.align()
        if not generation_config.return_dict_in_generate:
            return whole
        return GenerateDecoderOnlyOutput(sequences=whole, past_key_values=run.cache)  # pyright: ignore[reportArgumentType]

    __call__ = _decode


class Drafted(NamedTuple):
    """A token that has taken the draft's steps. Shapes: x (B, 1, D), positions (B or 1, 1)."""

    x: Tensor
    positions: Tensor
    carry: Carry


class Decoding:
    """A generation under way: each sequence's text, and the cache of all tokens but the newest of each."""

    def __init__(
        self,
        model: RecurrentForCausalLM,
        sampling: Sampling,
        few: int,
        steps: int,
        input_ids: Tensor,
        options: dict[str, Any],
    ):
        self.model, self.sampling, self.few, self.steps = model, sampling, few, steps
        self.texts = list(input_ids.split(1))
        self.active = list(range(len(input_ids)))
        self.newest = input_ids[:, -1:]
        self.cache: LoopCache = options["past_key_values"]
        self.prompt = input_ids.shape[1] - 1
        positions, mask = options["position_ids"], options.get("attention_mask")
        self.positions = positions[:, self.prompt : self.prompt + 1]
        known = self.cache.get_seq_length()
        if known < self.prompt:
            new = slice(known, self.prompt)
            past = None if mask is None else mask[:, : self.prompt]
            tokens: Any = input_ids[:, new]
            model(tokens, past, positions[:, new], self.cache, logits_to_keep=1, max_steps=steps)
        if mask is None and len(input_ids) > 1:
            mask = torch.ones_like(input_ids)
        self.mask = None if mask is None else mask[:, : self.prompt]
        self.together = windowed(model)
        self.done = Speculated()

    def round(self, ahead: int, criteria: StoppingCriteriaList) -> None:
        """Draft, verify, and take over what is kept."""
        ran, token = self.cache.ran, self.newest
        drafted, drafts, quick = [], self.newest[:, :0], []
        for place in range(ahead + 1):
            one, chances = self.draft(token, place, drafts, place < ahead)
            drafted.append(one)
            if chances is not None:
                token = self.sampling.drawn(chances[:, 0])
                quick.append(chances)
                drafts = torch.cat((drafts, token), 1)
        full = self.sampling.distribution(self.verify(drafted), self.texts, drafts)
        count, tokens = self.sampling.verified(drafts, torch.cat(quick, 1) if quick else full[:, :0], full)
        counts = count.tolist()
        kept = self.take(tokens, counts, criteria)
        self.done = self.done._replace(
            tokens=self.done.tokens + sum(kept),
            rounds=self.done.rounds + 1,
            drafted=self.done.drafted + ahead * sum(number > 0 for number in kept),
            accepted=self.done.accepted + sum(map(min, counts, kept)),
            ran=self.done.ran + self.cache.ran - ran,
        )

    def draft(self, token: Tensor, place: int, drafts: Tensor, wanted: bool) -> tuple[Drafted, Tensor | None]:
        """The first steps of a token; if wanted, the distribution of the next. Shapes: token (B, 1) -> (B, 1, V)."""
        positions, cache, model = self.positions + place, self.cache, self.model
        context, outside, real = model.surroundings(token, self.covered(place + 1), positions, cache, True)
        out = self.ran(context, self.few, real)
        if cache.policy.frozen and model.loop.halt.stops:
            settle(model.loop, out, context, self.few, model.predict)
        logits = model.lm_head(model.behind(out.value, outside)) if wanted else None
        cache.commit(outside.cache.run, by_token(out.steps, context["x"]))  # pyright: ignore[reportOptionalMemberAccess]
        chances = None if logits is None else self.sampling.distribution(logits, self.texts, drafts)
        return Drafted(context["x"], positions, out.carry), chances

    def verify(self, drafted: list[Drafted]) -> Tensor:
        """The steps that are left, of all drafted tokens at once. Shapes: -> (B, k + 1, V)."""
        model, cache, count = self.model, self.cache, len(drafted)
        reopen(cache, count, self.few)
        x, positions = (torch.cat(parts, 1) for parts in list(zip(*drafted, strict=True))[:2])
        masks = model.masks(x, self.covered(count), cache if cache.length else None, positions)
        attention = Attention(masks, positions, model.rotary(x, positions), View(cache, Pass(cache.length, count)))
        context = {"x": x, "attention": attention}
        out = self.ran(context, self.steps, carry=joined([one.carry for one in drafted]))
        if cache.policy.frozen:
            settle(model.loop, out, context, self.steps, model.predict)
        logits = model.lm_head(model.behind(out.value, attention))
        cache.commit(attention.cache.run, by_token(out.steps, x))  # pyright: ignore[reportOptionalMemberAccess]
        return logits

    def ran(self, context: Context, steps: int, real: Tensor | None = None, carry: Carry | None = None) -> Output:
        """The loop, from its start or from a carry, up to a number of steps in all."""
        out = looped(self.model.loop, context, real, steps, carry)
        passes = out.carry.index - (0 if carry is None else carry.index)
        self.done = self.done._replace(passes=self.done.passes + passes)
        return out

    def covered(self, count: int) -> Tensor | None:
        """The mask of the past and of so many new places, which are padding in sequences that have ended."""
        if self.mask is None:
            return None
        going = self.mask.new_zeros(len(self.mask), 1)
        going[self.active] = 1
        return torch.cat((self.mask, going.expand(-1, count)), 1)

    def take(self, tokens: Tensor, counts: list[int], criteria: StoppingCriteriaList) -> list[int]:
        """Append what each sequence keeps, up to where it ends; how many tokens that is. Shapes: tokens (B, k + 1)."""
        fewest = min(counts[row] for row in self.active) if self.together else tokens.shape[1]
        kept, ended = [0] * len(counts), []
        for row in self.active:
            for place in range(min(counts[row], fewest) + 1):
                self.texts[row] = torch.cat((self.texts[row], tokens[row : row + 1, place : place + 1]), 1)
                kept[row] = place + 1
                if bool(criteria(self.texts[row], None)):  # pyright: ignore[reportArgumentType] - there are no scores
                    ended.append(row)
                    break
        most = max(kept)
        self.cache.crop(most - tokens.shape[1])
        number = torch.tensor(kept, device=tokens.device)[:, None]
        real = torch.arange(most, device=tokens.device) < number
        if self.mask is not None:
            self.mask = torch.cat((self.mask, real.to(self.mask)), 1)
        assert self.cache.steps is not None
        self.cache.taken = [self.cache.steps * pad(real, (self.cache.length - most, 0), value=True)]
        self.positions = self.positions + number
        self.newest = torch.cat([text[:, -1:] for text in self.texts])
        self.active = [row for row in self.active if row not in ended]
        return kept

    def align(self) -> None:
        """Let the cache's places be those of the texts, up to where the shortest ends: none has read its last token."""
        length = min(text.shape[1] for text in self.texts) - 1
        if self.mask is None or self.cache.length == length:
            return
        real = self.mask.bool()
        real[:, : self.prompt] = True
        order = real.long().argsort(dim=1, descending=True, stable=True)[:, :length]
        for slot in self.cache.filled():
            index = order[:, None, :, None].to(slot.buffers[0].device)
            slot.buffers = [each.gather(2, index.expand(-1, each.shape[1], -1, each.shape[3])) for each in slot.buffers]
            slot.length = length
        assert self.cache.steps is not None
        self.cache.taken = [self.cache.steps.gather(1, order)]
        self.cache.length = length


def reopen(cache: LoopCache, count: int, steps: int) -> None:
    """Let the next pass go on with the last tokens, which have taken `steps` steps: slots of these stay as they are.

    What later steps were given in their place is forgotten. Layers behind the loop, which read a state after each step,
    number their slots by the steps behind it.
    """
    cache.length -= count
    cache.taken = [] if cache.steps is None else [cache.steps[:, : cache.length]]
    for layer, slots in cache.looped.items():
        for slot in slots[steps + (layer in cache.once) :]:
            slot.length = min(slot.length, cache.length)


def joined(carries: list[Carry]) -> Carry:
    """One carry of several tokens. A token that stopped before the others keeps its state, whatever the index."""
    whole = tree.map(lambda *leaves: torch.cat(leaves, 1), *carries)
    return whole._replace(index=max(carry.index for carry in carries))


def windowed(model: RecurrentForCausalLM) -> bool:
    """Whether a layer looks through a window, which counts places whether they are masked or not."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


def fitting(
    rule: Speculative, model: RecurrentForCausalLM, steps: int, config: GenerationConfig, options: dict[str, Any]
) -> None:
    """Refuse what cannot be, before anything is run."""
    if rule.draft_steps >= steps:
        raise ValueError(
            f"draft_steps must be below the {steps} steps of the model, got {rule.draft_steps}. Take fewer, or leave "
            "custom_generate out."
        )
    if model.loop.rows != 2:
        raise ValueError(
            f"rows of the loop must be 2, got {model.loop.rows}. Each token goes on from a state of its own."
        )
    cache = options.get("past_key_values")
    if not isinstance(cache, LoopCache):
        raise ValueError(f"past_key_values must be a LoopCache, got {cache}. Speculation needs use_cache=True.")
    if not cache.policy.exact:
        raise ValueError(
            f"policy must be exact, got {cache.policy}. What it predicts depends on how many tokens are read at once: "
            "take lm.Latest()."
        )
    if options.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds must be None, got embeddings. Speculation reads token ids.")
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    found = [name for name in asked if getattr(config, name)] + ["num_beams"] * ((config.num_beams or 1) > 1)
    if found:
        raise ValueError(f"{found[0]} must be left out, got {getattr(config, found[0])}. Generate without speculation.")


def alone(processor: LogitsProcessorList, batch: int) -> None:
    """Refuse processors that cannot look at one sequence and one place at a time."""
    apart = () if batch == 1 else (PrefixConstrainedLogitsProcessor,)
    found = [each for each in processor if isinstance(each, (UnbatchedClassifierFreeGuidanceLogitsProcessor, *apart))]
    if found:
        raise ValueError(
            f"logits_processor must be without memory and not know its place in the batch, got "
            f"{type(found[0]).__name__}. Generate without speculation, or one sequence at a time."
        )
