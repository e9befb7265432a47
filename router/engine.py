"""The engine: a batch of sequences that join and leave at any step.

`Engine.step` is the system in a few lines: plan, make room, compute, sample. It knows nothing of threads, HTTP
or Ray; `router.engine_thread` runs it. Sequences keep their keys and values in blocks; when blocks run out, the
youngest is swapped to host memory, bit for bit, and computed again only where that memory is full too.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from torch import Tensor

from experts.errors import ExpertError
from router.backbone import Backbone
from router.batcher import BatchLimits, Chunk, SequenceFacts, StepPlan, admission_positions, plan_step
from router.drawing import draw, draw_together
from router.errors import GrammarFailed, PromptInvalid, QueueFull, RequestTooLong
from router.grammar import Grammars, GrammarState
from router.kv_cache import KvPool, blocks_for
from router.kv_room import KvRoom
from router.logprobs import prompt_logprobs, token_logprob
from router.open_passes import OpenPasses
from router.pace import Pace
from router.prompt_groups import match_members, shared_positions
from router.prompt_inputs import NO_INPUTS, PromptInputs
from router.request import FinishReason, GenerationRequest, TokenEvent
from router.request_checks import check_request
from router.routing_choice import RoutingReport
from router.sequence import Sequence
from router.step_pass import PassRows, StepPass, begin_pass, hand_out_captured, score_probed
from router.step_routing import NativePolicy, PromptProbe, RoutingPolicy, RoutingReporter, RoutingWatcher

logger = logging.getLogger(__name__)

EXPERT_FAILED = "an expert could not be computed"
"""The error of every request in a step whose experts failed; none of them is to blame."""
TURN_S = 0.25
"""How long somebody who comes may wait for a prompt beside which nobody ran, by what layers took before."""


@dataclass
class EngineStats:
    """Counters since the start; read by status and metrics."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    failed: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    last_step_at: float = 0.0
    """Monotonic clock."""


class Engine:
    """Runs steps over a backbone and a KV pool. Not safe for several threads."""

    def __init__(
        self,
        backbone: Backbone,
        pool: KvPool,
        limits: BatchLimits | None = None,
        *,
        swap_budget_bytes: int = 0,
    ) -> None:
        self.backbone, self.pool = backbone, pool
        self.limits = limits or BatchLimits()
        self.stats = EngineStats()
        self.kv = KvRoom(pool, swap_budget_bytes)
        self.allocator = self.kv.allocator
        self.policy: RoutingPolicy = NativePolicy()
        self.reporter: RoutingReporter | None = None
        """Of a policy that takes requests with a choice of routing; without one they are refused."""
        self.watchers: tuple[RoutingWatcher, ...] = ()
        self.probe: PromptProbe | None = None
        self.grammars: Grammars | None = None
        """Of the model's vocabulary; without them requests with a grammar are refused."""
        self._num_quarantined = 0
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: OrderedDict[str, Sequence] = OrderedDict()
        self._passes = OpenPasses()
        self.is_called: Callable[[], bool] = _never
        """Whether somebody wants a step to end, to bring or cancel a request."""
        self.pace = Pace(len(backbone.layers))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def swapped_bytes(self) -> int:
        """Host memory that preempted sequences hold."""
        return self.kv.swapped_bytes

    @property
    def num_waiting_with_media(self) -> int:
        """Requests in the queue that hold what stands for their media. May be read on any thread."""
        return sum(bool(sequence.inputs.embeddings) for sequence in tuple(self._waiting.values()))

    def open_requests(self) -> list[str]:
        """Ids of all requests that have not ended."""
        return [*self._running, *self._waiting]

    @property
    def max_tokens_per_sequence(self) -> int:
        """Prompt and answer together: the context, or the whole cache if that is smaller."""
        capacity = (self.allocator.num_blocks - 1) * self.pool.keys.shape[3]
        return min(self.backbone.config.max_position_embeddings, capacity)

    def submit(
        self,
        request: GenerationRequest,
        inputs: PromptInputs = NO_INPUTS,
        grammar: GrammarState | None = None,
    ) -> None:
        """Queue a request. grammar: the state that `begin_grammar` gives, which is asked for it where it is missing.

        Raises QueueFull, RequestTooLong, PromptInvalid or GrammarFailed; ValueError for a used id.
        """
        if request.request_id in self._waiting or request.request_id in self._running:
            raise ValueError(f"request id {request.request_id!r} is in use")
        config = self.backbone.config
        check_request(request, config.vocab_size)
        if self.reporter is None and not request.routing.is_plain:
            raise ValueError("this engine has native routing only")
        self._check_group(request, inputs)
        inputs.validate(len(request.prompt_ids), config.num_layers, config.hidden_size)
        num_open = len(self._waiting) + len(self._running)
        if num_open >= self.limits.max_open:
            raise QueueFull(num_open, retry_after_s=1.0)
        sequence = Sequence(request, inputs, grammar or self.begin_grammar(request))
        if sequence.max_total > self.max_tokens_per_sequence:
            raise RequestTooLong(sequence.max_total, self.max_tokens_per_sequence)
        self._waiting[sequence.name] = sequence

    def begin_grammar(self, request: GenerationRequest) -> GrammarState | None:
        """Of a request that has one. May take long, and be called on any thread. Raises GrammarFailed."""
        sampling = request.sampling
        if sampling.grammar is None:
            return None
        if self.grammars is None:
            raise GrammarFailed("this router follows none")
        return self.grammars.begin(sampling.grammar, sampling.stop_token_ids, request.generated_ids)

    def _check_group(self, request: GenerationRequest, inputs: PromptInputs) -> None:
        """Sharing with another prompt would answer a question that nobody asked."""
        if request.group is None:
            return
        for other in (*self._running.values(), *self._waiting.values()):
            if other.request.group != request.group:
                continue
            if (other.request.prompt_ids, other.inputs.media) != (request.prompt_ids, inputs.media):
                raise PromptInvalid(f"its group {request.group[:64]!r} has another prompt")

    def cancel(self, request_id: str) -> bool:
        """End a request and free its KV blocks at once. Returns False when it is not known (any more)."""
        sequence = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if sequence is None:
            return False
        self._keep_for_pass(sequence)
        self._release(sequence)
        return True

    def _keep_for_pass(self, sequence: Sequence) -> None:
        """Leave an ended sequence's blocks to the pass that still writes to them."""
        step = self._passes.of(sequence)
        if step is None:
            return
        name = f"{sequence.name} in a pass of {id(step):x}"
        self.kv.leave_to(name, sequence)
        step.kept_tables.append(name)
        if not any(self._is_running(rows.sequence) for rows in step.rows):
            self._drop(step)

    def step(self) -> list[TokenEvent]:
        """Compute one step for the sequences that fit, and of a prompt's pass what goes beside running streams, or all
        of it. Returns what is new for each request."""
        started = time.perf_counter()
        self._doubt_prefixes()
        parents, held = self._match_groups()
        plan = self._plan(parents, held)
        self._make_room(plan, parents)
        planned = time.perf_counter()
        events = self._compute(plan.chunks) if plan.chunks else []
        if plan.paused:
            self._passes.begin(self._begin(plan.paused))
        events += self._compute_beside(started) if plan.chunks else self._compute_alone()
        self.stats.steps += 1
        self.stats.last_step_at = time.monotonic()
        self._add_phase("plan", planned - started)
        self._add_phase("step", time.perf_counter() - started)
        return events

    def _doubt_prefixes(self) -> None:
        """An actor that gave wrong rows may have been part of anything that is in the cache."""
        num_quarantined = self.backbone.directory.num_quarantined
        if num_quarantined != self._num_quarantined:
            self._num_quarantined = num_quarantined
            self.kv.forget_prefixes((*self._running.values(), *self._waiting.values()))

    def _match_groups(self) -> tuple[dict[str, str], frozenset[str]]:
        """See `match_members`; most steps have nobody to match."""
        if not any(sequence.can_share_prompt for sequence in self._waiting.values()):
            return {}, frozenset()
        return match_members(
            (sequence.as_member() for sequence in self._running.values()),
            (sequence.as_member() for sequence in self._waiting.values()),
        )

    def _plan(self, parents: Mapping[str, str], held: frozenset[str]) -> StepPlan:
        self.kv.begin_step()
        running = []
        # A sequence grows by at most one block a step: before that is scarce, nobody is preempted.
        is_scarce = self.allocator.num_free < len(self._running)
        for sequence in self._running.values():
            num_blocks = self.allocator.num_blocks_of(sequence.name)
            num_shared = self.allocator.num_shared(sequence.name) if is_scarce else 0
            facts = sequence.facts(num_blocks, num_shared)
            if self._passes and self._passes.of(sequence) is not None:
                facts = facts._replace(is_in_pass=True)
            running.append(facts)
        waiting = self._waiting_facts(parents, held)
        most_paused = None
        if self.limits.is_paced and (self._waiting or any(facts.num_missing > 1 for facts in running)):
            most_paused = self._passes.most_rows(self.limits, self.pace, self.backbone.divisible())
        return plan_step(running, waiting, self.allocator.num_free, self.limits, most_paused)

    def _waiting_facts(self, parents: Mapping[str, str], held: frozenset[str]) -> Iterator[SequenceFacts]:
        for sequence in self._waiting.values():
            if sequence.name in parents:
                num_prompt = len(sequence.request.prompt_ids)
                num_shared = blocks_for(shared_positions(num_prompt))
                yield sequence.facts(0, num_shared, num_given=num_prompt - 1)
            elif sequence.name not in held:
                yield self.kv.facts_with_prefix(sequence)

    def _make_room(self, plan: StepPlan, parents: Mapping[str, str]) -> None:
        for name in plan.preempt:
            self._preempt(name)
        admitted = [self._waiting.pop(name) for name in plan.admit]
        needed = [
            admission_positions(sequence.facts(0), self.limits.admission_reserve) for sequence in admitted
        ]
        self.kv.take_matched(admitted)
        for sequence, num_positions in zip(admitted, needed, strict=True):
            if sequence.name in parents:
                self.kv.fork(self._running[parents[sequence.name]], sequence, num_positions)
            else:
                self.kv.admit(sequence, num_positions)
            self._running[sequence.name] = sequence
        for chunk in (*plan.chunks, *plan.paused):
            self.kv.grow(chunk.name, chunk.first, chunk.first + chunk.count)

    def _preempt(self, name: str) -> None:
        """Take a running sequence's blocks; it goes to the front of the queue."""
        sequence = self._running.pop(name)
        if (step := self._passes.of(sequence)) is not None:
            self._drop(step)  # it would write to blocks that are others' now
        self.kv.swap_out(sequence)
        self._waiting[name] = sequence
        self._waiting.move_to_end(name, last=False)
        self.stats.preemptions += 1

    def _begin(self, chunks: SequenceOf[Chunk]) -> StepPass:
        members = [(chunk, self._running[chunk.name]) for chunk in chunks]
        return begin_pass(self.backbone, self.allocator, members, self.policy, self.watchers, self.probe)

    def _advance_pass(
        self, step: StepPass, until_ns: int | None = None, most_layers: int | None = None
    ) -> list[TokenEvent]:
        """One more layer, or several, or until then some of the next half; see `ForwardPass.advance`. Where that fails,
        returns the ends of the pass's requests."""
        directory, forward = self.backbone.directory, step.forward
        foreign_rows, num_done = directory.foreign_rows, forward.num_done
        half = None if forward.is_next_divisible or until_ns is None else forward.next_half
        started = time.perf_counter()
        try:
            forward.advance(self.pool, until_ns, most_layers)
        except ExpertError as error:
            living = [rows.sequence for rows in step.rows if self._is_running(rows.sequence)]
            trace = step.forward.batch.trace
            logger.error("step failed, request %s and %d others end: %s", trace, len(living) - 1, error)
            self._drop(step)
            return [self._fail(sequence, EXPERT_FAILED) for sequence in living]
        seconds = time.perf_counter() - started
        step.layer_s += seconds
        self._passes.note(step, seconds)
        if half is not None:
            self.pace.note_half(half, step.num_tokens, seconds)
        if not forward.is_in_layer:
            self.pace.note_layer(step.num_tokens, step.layer_s / (forward.num_done - num_done))
            step.layer_s = 0.0
        step.is_mixed = step.is_mixed or directory.foreign_rows != foreign_rows
        return []

    def _compute(self, chunks: SequenceOf[Chunk]) -> list[TokenEvent]:
        """All layers at once."""
        started = time.perf_counter()
        step = self._begin(chunks)
        while not step.forward.is_done:
            if failed := self._advance_pass(step):
                return failed
        events = self._finish(step)
        if all(chunk.count == 1 for chunk in chunks):
            seconds = time.perf_counter() - started
            self.pace.note_streams(seconds, len(chunks), is_beside=bool(self._passes))
        return events

    def _compute_beside(self, started: float) -> list[TokenEvent]:
        """As much of the passes as running streams can wait for, at least some. started: when the step began."""
        until_s = max(started + (self.pace.longest_s or 0.0), time.perf_counter() + self.pace.least_s)
        events: list[TokenEvent] = []
        while self._passes:
            step = self._passes.next
            events += self._advance_pass(step, _monotonic_ns(until_s)) or self._end_pass(step)
            if step.forward.is_in_half:
                self.pace.note_pause(step.num_tokens, time.perf_counter() - until_s)
            if self._passes and not self._may_go_on(self._passes.next, until_s - time.perf_counter()):
                break
        return events

    def _compute_alone(self) -> list[TokenEvent]:
        """The last pass, where nobody waits for a step's end: all of it, or until somebody comes."""
        if not self._passes:
            return []
        step = self._passes.next
        while step in self._passes:
            # Layers that may take long let somebody in between; others are computed as quickly as they can be.
            layer_s, until_s = self.pace.layer_s(step.num_tokens), time.perf_counter() + TURN_S
            is_long = layer_s is None or layer_s > TURN_S
            until_ns = _monotonic_ns(until_s) if is_long else None
            most_layers = max(1, int(TURN_S / layer_s)) if layer_s else None
            if events := self._advance_pass(step, until_ns, most_layers):
                return events
            if events := self._end_pass(step):
                return events
            if self.is_called():
                break
        return []

    def _end_pass(self, step: StepPass) -> list[TokenEvent]:
        """What a pass gave, where it has come to its end."""
        if not step.forward.is_done:
            return []
        events = self._finish(step)
        self._drop(step)
        return events

    def _may_go_on(self, step: StepPass, left_s: float) -> bool:
        """Whether streams can wait for more of a pass: for all of the next half, where that cannot pause."""
        forward = step.forward
        if forward.is_next_divisible:
            return left_s > 0
        return self.pace.may_go_on(forward.next_half, step.num_tokens, left_s)

    def _drop(self, step: StepPass) -> None:
        """Forget a pass, and free what it held of requests that have ended. Others' rows may be computed again."""
        if self.reporter is not None:
            self.reporter.abandon(step.forward.batch.routing.owners)
        for name in step.kept_tables:
            self.kv.free_left(name)
        self._passes.drop(step)

    def _is_running(self, sequence: Sequence) -> bool:
        return self._running.get(sequence.name) is sequence

    def _finish(self, step: StepPass) -> list[TokenEvent]:
        """After the last layer: hand out what the rows gave. Sequences that ended meanwhile get nothing."""
        output = step.forward.finish()
        started = time.perf_counter()
        living = [rows for rows in step.rows if self._is_running(rows.sequence)]
        events: list[TokenEvent] = []
        if output.captured:
            hand_out_captured(step.rows, output.captured, self._is_running)
        if len(output.scored_RD):
            events += self._score_prompts(step.rows, output.scored_RD)
            if self.probe is not None:
                score_probed(step.rows, output.scored_RD, self.probe, self.backbone.logits)
        for phase, seconds in output.phase_seconds.items():
            self._add_phase(phase, seconds)
        for rows in living:
            sequence, first, end = rows.sequence, rows.chunk.first, rows.end
            sequence.is_mixed = sequence.is_mixed or step.is_mixed  # whose rows they were is not told
            sequence.num_computed = end
            num_prompt = len(sequence.request.prompt_ids)
            if first < num_prompt:
                self.stats.prompt_tokens += min(end, num_prompt) - first
        finishing = [rows.sequence for rows in step.rows if rows.is_last]
        drawn = draw_together(finishing, output.logits_LV, output.best_L)
        logits = output.logits_LV.unbind()
        for sequence, logits_V, best, token in zip(finishing, logits, output.best_L, drawn, strict=True):
            if self._is_running(sequence):
                events.append(
                    self._advance(sequence, logits_V, best, token)
                    if best >= 0
                    else self._fail_non_finite(sequence)
                )
        self._add_phase("sampling", time.perf_counter() - started)
        return events

    def _score_prompts(self, parts: SequenceOf[PassRows], scored_RD: Tensor) -> list[TokenEvent]:
        """Note the logprobs of prompt tokens where they are wanted. Returns the ends of those that failed."""
        events = []
        row = 0
        for part in parts:
            sequence = part.sequence
            following = [sequence.tokens[p + 1] for p in part.unscored]
            if following and self._is_running(sequence):
                hidden_RD = scored_RD[row : row + len(following)]
                num_top = sequence.request.num_prompt_logprobs or 0
                found = prompt_logprobs(hidden_RD, following, num_top, self.backbone.logits)
                if found is None:
                    events.append(self._fail_non_finite(sequence))
                else:
                    sequence.prompt_logprobs.extend(found)
            row += len(following)
        return events

    def _advance(self, sequence: Sequence, logits_V: Tensor, best: int, drawn: int | None) -> TokenEvent:
        """Draw the sequence's next token from finite logits, and end it where it must end. best: the likeliest.
        drawn: the next one where it was drawn already."""
        request = sequence.request
        # What is known of the prompt goes out once, with the first token.
        is_first = not sequence.has_drawn
        prompt = tuple(sequence.prompt_logprobs) if is_first else ()
        num_cached = (sequence.num_cached or 0) if is_first else 0
        if not request.sampling.max_tokens:
            routing = self._routing_report(sequence)
            self._end(sequence)
            return TokenEvent(
                sequence.name,
                (),
                "length",
                prompt_logprobs=prompt,
                routing=routing,
                is_mixed=sequence.is_mixed,
                num_cached=num_cached,
            )
        try:
            token = draw(sequence, logits_V, best) if drawn is None else drawn
            sequence.append(token)
        except GrammarFailed as error:
            return self._fail(sequence, str(error))
        self.stats.generated_tokens += 1
        if is_first:
            self.kv.keep_prefix(sequence)
        reason = sequence.finish_after(token)
        routing = self._routing_report(sequence)
        if reason is not None:
            self._end(sequence)
        found = (
            () if request.num_logprobs is None else (token_logprob(logits_V, token, request.num_logprobs),)
        )
        return TokenEvent(
            sequence.name,
            (token,),
            reason,
            None,
            found,
            prompt,
            routing,
            sequence.is_mixed,
            num_cached=num_cached,
            is_first=is_first,
        )

    def _fail_non_finite(self, sequence: Sequence) -> TokenEvent:
        logger.error("request %s: non-finite logits", sequence.name)
        return self._fail(sequence, "the model produced non-finite numbers")

    def _fail(self, sequence: Sequence, message: str) -> TokenEvent:
        self.kv.free(sequence, must_scrub=True)
        self._end(sequence)
        self.stats.failed += 1
        reason: FinishReason = "error"
        return TokenEvent(sequence.name, (), reason, message)

    def _routing_report(self, sequence: Sequence) -> RoutingReport | None:
        if self.reporter is None or sequence.request.routing.is_plain:
            return None
        return self.reporter.report(sequence.name)

    def _end(self, sequence: Sequence) -> None:
        del self._running[sequence.name]
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        if self.reporter is not None:
            self.reporter.forget(sequence.name)

    def _add_phase(self, phase: str, seconds: float) -> None:
        self.stats.phase_seconds[phase] = self.stats.phase_seconds.get(phase, 0.0) + seconds


def _never() -> bool:
    return False


def _monotonic_ns(moment_s: float) -> int:
    """A moment of `time.perf_counter` by the monotonic clock."""
    return time.monotonic_ns() + round((moment_s - time.perf_counter()) * 1e9)
