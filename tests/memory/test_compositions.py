"""All answers thrown together: a composition works, or is refused with a reason when it is put together or built."""

from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import evenflow as ef
from evenflow import memory as room
from evenflow.memory import (
    Absolute,
    Admit,
    AllHeld,
    Averaged,
    BestBlocks,
    ByHeadGroup,
    Clipped,
    Clustered,
    Contiguous,
    Convolved,
    DistanceCeiling,
    Dropped,
    Everything,
    Evict,
    Fold,
    LastByModality,
    LastSeconds,
    LeastAttended,
    LeastDiverse,
    LinearState,
    Memory,
    MemoryState,
    Merged,
    Never,
    Oldest,
    Pages,
    Place,
    Realigned,
    Recall,
    Regions,
    Rerouted,
    RoundsByModality,
    Routed,
    SameBucket,
    Spilled,
    TextFirst,
    Thinned,
    Timeless,
    TopBlocks,
    UntilMass,
)
from evenflow.memory.chunks import ArenaState

from .drive import Inputs, random_inputs

SINK, WINDOW = 1, 4
ROPES = [ef.Rope.axial((4, 4, 4)), ef.Rope(), None]
WEIGHTS = torch.linspace(-1, 1, 2 * 12 * 13, dtype=torch.float64).reshape(2, 12, 13)

ADMIT = [Everything()]
# Each with the window that it goes with.
EVICT = [
    (Oldest(), WINDOW), (Oldest(with_fresh=True), WINDOW), (Oldest(), None), (Never(), None), (Never(room=30), None),
    (LastSeconds(2.5), None), (LastSeconds(9.0), WINDOW), (LastByModality({0: 2, 1: 3}, others=1), None),
    (LeastAttended(3, 1, reuse=2), WINDOW), (LeastAttended(4, 2, "max"), WINDOW),
    (LeastDiverse(24), None), (LeastDiverse(13, 0.1), None),
    (ByHeadGroup(((), (0,))), WINDOW), (ByHeadGroup(((), (0,)), 2, 1, 2), WINDOW),
    (RoundsByModality(2, 1, 2, 3), None),
]  # fmt: skip
FOLD = [
    Dropped(), Averaged(0.5), Convolved(1), Convolved(1, torch.rand(2, 5, dtype=torch.float64), "raster"),
    LinearState(projection=0.3), LinearState(6, WEIGHTS, raw_query=True),
    Merged(0.1), Merged(0.3, "key", "mean"), Merged(0.3, "query", "first"),
    Thinned(4, 2, 6), Thinned(3, 2, 4, 0.3, 2, 2, by_time=True, packed=False), Spilled(2, 10**6),
    Clustered(3, 6, page=2), Clustered(2, 4, per_head=True, unrotated=True, page=3),
    Clustered(2, 4, page=3), Clustered(3, 6, per_head=True, unrotated=True, page=2),
    Routed(SINK, 0.5), Routed(3 * SINK, 0.9),
]  # fmt: skip
RECALL = [
    AllHeld(), BestBlocks(0.5, 2), SameBucket(2, 2), SameBucket(3, 1, 1, (1,)), Pages(2, 2, 0.5),
    Pages(1, 3, 0.4, Absolute()), TopBlocks(2), UntilMass(0.5), UntilMass(0.3, "shifted", union=True),
    Rerouted(3, 1, 1, 2, seed=5), Rerouted(2, 2, 1, 3),
]  # fmt: skip
PLACE = [
    Absolute(), Contiguous(), Clipped(6), DistanceCeiling(5), DistanceCeiling(4, packed=True), Realigned(),
    Regions(9, 3), Regions(30, 4, 2), TextFirst(1), Timeless(),
]  # fmt: skip


def test_no_answer_is_left_out():
    """Every answer that the memory room offers is thrown in below."""
    used = {type(answer) for answer in [*ADMIT, *(evict for evict, _ in EVICT), *FOLD, *RECALL, *PLACE]}
    bases = Admit, Evict, Fold, Recall, Place
    offered = {x for x in vars(room).values() if isinstance(x, type) and issubclass(x, bases) and x not in bases}
    assert used == offered


@st.composite
def drawn(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a memory is made of, and the model: mostly what goes together."""
    frame, inside = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(["causal", "both"]))
    evict, window = draw(st.sampled_from(EVICT))
    folds = [f for f in FOLD if evict.in_order or not isinstance(f, Averaged | Convolved)]
    folds = [f for f in folds if (isinstance(evict, Oldest) and inside == "both") or not isinstance(f, Routed)]
    fold = draw(st.sampled_from([f for f in folds if not evict.content or not isinstance(f, Clustered)]))
    away = {UntilMass: Clustered, TopBlocks: Spilled}  # what a recall needs
    near = [r for r in RECALL if isinstance(fold, away.get(type(r), Fold))]
    together = [r for r in near if isinstance(r, BestBlocks | SameBucket) or getattr(r, "union", False)]
    plain = isinstance(evict, Oldest) and not evict.with_fresh and window and inside == "both"
    near = [r for r in near if plain or not isinstance(r, Rerouted)]
    recall = draw(st.sampled_from([r for r in near if inside == "both" or r not in together]))
    places = [p for p in PLACE if not p.moves or not isinstance(fold, Clustered)]
    heads, kv_heads = draw(st.sampled_from([(4, 2), (4, 4), (2, 1)]))
    parts = {
        "sink": draw(st.sampled_from([0, SINK])), "window": window, "frame": frame, "inside": inside, "evict": evict,
        "fold": fold, "recall": recall, "place": draw(st.sampled_from(places)), "chunk": draw(st.sampled_from([1, 2])),
    }  # fmt: skip
    rope = draw(st.sampled_from(ROPES))
    model = {"layers": 2, "heads": heads, "kv_heads": kv_heads, "head_dim": 12, "dtype": torch.float64, "rope": rope}
    if isinstance(fold, Routed):  # chunks as long as the sink
        parts |= {"sink": SINK, "window": 2 * SINK, "chunk": SINK}
    return parts, model


def sizes(memory: Memory, steps: int) -> list[int]:
    """Tokens of each step: as the fold needs them."""
    frame = memory.frame or 1
    if isinstance(memory.fold, Convolved):
        first = memory.sink + memory.fold.frames + (memory.window or 0)
        return [first * frame] + [4 * memory.fold.frames * frame] * (steps - 1)
    return [memory.chunk * frame] * steps


def tags(first: int, count: int) -> dict[str, Tensor]:
    """Of tokens from `first` on: rounds of 7 tokens, with a picture of two rows each."""
    at = torch.arange(first, first + count)
    return {
        "time": at * 0.4, "modality": torch.where(at % 7 < 4, 1, torch.where(at % 7 < 6, 0, 2)), "segment": at // 7,
        "coordinates": torch.stack([at % 7 // 2, at % 2], -1), "route": torch.where(at < 30, 0, at // 6 % 3),
    }  # fmt: skip


def fed(
    state: MemoryState, inputs: list[Inputs], cuts: list[int], start: int = 0, commit: bool = True, **options: Any
) -> list[Tensor]:
    """Outputs of each step, layers stacked; the tokens are those from `start` on."""
    outs, at = [], start
    for m in cuts:
        with state.step(m, tags=tags(at, m), commit=commit, **options):
            outs.append(
                torch.stack([state.attend(n, *(x[:, :, at : at + m] for x in layer)) for n, layer in enumerate(inputs)])
            )
        at += m
    return outs


def rows_of(inputs: list[Inputs], rows: slice) -> list[Inputs]:
    return [tuple(x[rows] for x in layer) for layer in inputs]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kept(state: MemoryState) -> dict[str, Tensor]:
    """All that a memory needs to go on, but for what it decided for a chunk, and how far back it can undo."""
    return {name: x for name, x in state.state_dict().items() if name != "floor" and not name.startswith("pending.")}


def as_before(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether nothing changed but the number of slots, which may have grown."""
    return before.keys() == after.keys() and all(
        torch.equal(x, after[name]) for name, x in before.items() if x.shape == after[name].shape
    )


def built(parts: dict[str, Any], model: dict[str, Any], **more: Any) -> MemoryState | None:
    """None for what is refused; an error of any other kind is a defect."""
    try:
        return Memory(**parts, **{k: more.pop(k) for k in ("rows",) if k in more}).build(**model, **more)
    except ValueError as error:
        event(f"refused: {str(error)[:60]}")
        return None


@settings(max_examples=10, deadline=None)
@given(drawn(), st.integers(0, 2**20))
def test_any_composition_is_causal_deterministic_bounded_and_exact_to_save_and_fork(composition, seed):
    parts, model = composition
    state = built(parts, model)
    if state is None:
        return
    memory, cuts = state.memory, sizes(state.memory, 8)
    half, steps = sum(cuts[:4]), cuts[4:]
    inputs = random_inputs(state, sum(cuts) + 24 * cuts[-1], seed)
    first = fed(state, inputs, cuts[:4])
    twin, loaded = state.fork(), built(parts, model)
    loaded.load_state_dict(state.state_dict())

    before = kept(state)
    looked = fed(state, inputs, cuts[4:5], half, commit=False)
    assert looked[0].isfinite().all() and as_before(before, kept(state))
    second = fed(twin, inputs, steps, half)
    assert equal(fed(loaded, inputs, steps, half), second)
    assert [loaded.held(n) for n in range(2)] == [twin.held(n) for n in range(2)]
    assert all(out.isfinite().all() for out in first + second)

    # What comes later changes nothing before; in causal steps neither does what comes later in the step.
    changed = [tuple(x.clone() for x in layer) for layer in inputs]
    last = half - 1 if memory.inside == "causal" else half
    for x in (x for layer in changed for x in layer):
        x[:, :, last:] += 1
    other, again = built(parts, model), built(parts, model)
    again_first = fed(again, inputs, cuts[:4])
    assert equal(again_first, first)
    late = fed(other, changed, cuts[:4])
    assert equal(late[:3], first[:3])
    torch.testing.assert_close(late[3][..., :-1, :], first[3][..., :-1, :], rtol=0, atol=1e-12)

    # A step that fails leaves no trace.
    before = kept(again)
    spoiled = [tuple(x * (torch.nan if n else 1) for x in layer) for n, layer in enumerate(inputs)]
    with pytest.raises(ValueError, match="NaN"):
        fed(again, spoiled, cuts[4:5], half)
    assert not isinstance(again, ArenaState) or as_before(before, kept(again))
    assert equal(fed(again, inputs, steps, half), second)

    if memory.evict not in (Never(), Never(room=30), Oldest()) or memory.window is not None:
        start, token = sum(cuts), 2 * model["kv_heads"] * (12 + 12) * 8  # bytes of one token
        fed(again, inputs, [cuts[-1]] * 24, start)
        assert max(len(again.held(n, 0, head)) for n in range(2) for head in range(model["kv_heads"])) <= 36
        assert again.nbytes <= 200 * token  # slots double where no window says how many there will be
    again.reset()
    assert again.position == 0 and again.held(0) == []
    assert equal(fed(again, inputs, cuts[:4]), first)


@settings(max_examples=8, deadline=None)
@given(drawn(), st.integers(0, 2**20), st.sampled_from(["batch", "copies", "ages"]))
def test_rows_of_any_composition_are_streams_of_their_own(composition, seed, kind):
    """Rows of a batch, copies for denoising steps, one by one, and rows that do not take part in every step."""
    parts, model = composition
    if kind == "ages" and isinstance(parts["fold"], Convolved):
        return  # its first step is longer
    together = built(parts, model, rows=2) if kind == "copies" else built(parts, model, batch=2)
    if together is None:
        return
    alone, cuts = [built(parts, model) for _ in range(2)], sizes(together.memory, 8)
    wide = built(parts, model, batch=2)
    inputs = random_inputs(wide, sum(cuts), seed)
    separate = [rows_of(inputs, slice(row, row + 1)) for row in range(2)]
    if kind != "ages":
        expected = [
            torch.cat(outs, 1)
            for outs in zip(*(fed(a, x, cuts) for a, x in zip(alone, separate, strict=True)), strict=True)
        ]
        if kind == "batch":
            got = fed(together, inputs, cuts)
        else:
            got, at = [], 0
            for m in cuts:
                got.append(torch.cat([fed(together, separate[row], [m], at, row=row)[0] for row in range(2)], 1))
                at += m
    else:
        got, expected, ages = [], [], [0, 0]
        for step, m in enumerate(cuts):
            takes = [True, step % 3 != 1]
            given = [tags(age, m) for age in ages]
            part = [
                tuple(torch.cat([x[row : row + 1, :, a : a + m] for row, a in enumerate(ages)]) for x in layer)
                for layer in inputs
            ]
            mask = torch.tensor(takes)[:, None].expand(2, m)
            with together.step(m, tags={n: torch.stack([t[n] for t in given]) for n in given[0]}, mask=mask):
                out = torch.stack([together.attend(n, *layer) for n, layer in enumerate(part)])
            for row in (row for row in range(2) if takes[row]):
                got.append(out[:, row : row + 1])
                expected += fed(alone[row], separate[row], [m], ages[row])
                ages[row] += m
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    last = model["kv_heads"] - 1
    assert [together.held(1, row, last) for row in range(2)] == [one.held(1, 0, last) for one in alone]


@settings(max_examples=6, deadline=None)
@given(drawn().filter(lambda c: isinstance(c[0]["recall"], Pages | TopBlocks)), st.integers(0, 2**20))
def test_any_composition_that_retrieves_answers_each_row_for_itself(composition, seed):
    parts, model = composition
    together = built(parts, model, batch=2)
    if not isinstance(together, ArenaState):
        return
    cuts = sizes(together.memory, 6)
    inputs, asked = random_inputs(together, sum(cuts), seed), random_inputs(together, 3, seed + 1)
    answers = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        state = together if rows.stop - rows.start == 2 else built(parts, model)
        fed(state, rows_of(inputs, rows), cuts)
        before, question = kept(state), state.question()
        out = []
        for step, part in ((question.retrieve(2), slice(0, 2)), (question.step(1), slice(2, 3))):
            with step:
                out += [question.attend(n, *(x[rows, :, part] for x in layer)) for n, layer in enumerate(asked)]
        answers.append(torch.cat(out, 2))
        assert as_before(before, kept(state))
    torch.testing.assert_close(answers[0], torch.cat(answers[1:]), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "sink": st.sampled_from([0, 1, 3]), "window": st.sampled_from([None, 1, 2, 5]),
            "frame": st.sampled_from([1, 2, 3]), "inside": st.sampled_from(["causal", "both"]),
            "rows": st.sampled_from([1, 2]), "evict": st.sampled_from([evict for evict, _ in EVICT]),
            "fold": st.sampled_from(FOLD), "recall": st.sampled_from(RECALL), "place": st.sampled_from(PLACE),
        }
    ),
    st.sampled_from([{}, {"reach": 3}, {"alibi": torch.tensor([0.5, 0.1])}]),
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_read(parts, more):
    model = {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 12, "dtype": torch.float64, **more}
    state = built(parts, {**model, "rope": None if "alibi" in more else ROPES[0]})
    if state is None:
        return
    event("works")
    cuts = sizes(state.memory, 5)
    if isinstance(state.memory.fold, Averaged) and state.memory.window is not None:
        cuts = [min(m, state.memory.window * (state.memory.frame or 1)) for m in cuts]
    inputs = random_inputs(state.memory.build(**model, rope=None, batch=parts["rows"]), sum(cuts))
    assert all(out.isfinite().all() for out in fed(state, inputs, cuts))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"evict": Never(), "window": 4}, "nothing ever leaves"),
        ({"evict": LeastDiverse(9), "window": 4}, "budget of its own"),
        ({"evict": RoundsByModality(1, 1, 1, 1), "window": 4}, "windows of its own"),
        ({"evict": LeastAttended(3, 1)}, "needs a window"),
        ({"evict": LeastAttended(9, 1), "window": 4}, "capacity 9"),
        ({"evict": LeastAttended(3, 3), "sink": 1, "window": 4}, r"sink 1 \+ recent 3"),
        ({"evict": ByHeadGroup(recent=3), "window": 2}, "counts the 3 last frames"),
        ({"evict": ByHeadGroup(segments=2), "window": 2, "frame": 3}, "cannot be cut into 2"),
        ({"fold": Averaged(0.5), "window": 4}, "sink is 0"),
        ({"fold": Averaged(0.5), "sink": 1, "evict": LeastDiverse(9)}, "by its order"),
        ({"fold": Convolved(1), "evict": LeastDiverse(9), "inside": "both"}, "take Oldest"),
        ({"fold": Convolved(1), "window": 4}, "inside='both'"),
        ({"fold": Convolved(1), "window": 3, "evict": Oldest(True), "inside": "both"}, "4 frames, must fit"),
        ({"fold": Spilled(3, 10**6), "window": 4, "rows": 2}, "one copy"),
        ({"fold": Clustered(), "place": Absolute(), "window": 4, "rows": 2}, "one copy"),
        ({"fold": Clustered(), "window": 4}, "does not move"),
        ({"fold": Clustered(), "evict": LeastDiverse(9), "place": Absolute()}, "take Oldest"),
        ({"recall": UntilMass(0.5), "window": 4}, "use Clustered"),
        ({"recall": UntilMass(0.5), "fold": Clustered(), "window": 4, "place": DistanceCeiling(4)}, "DistanceCeiling"),
        ({"recall": TopBlocks(3), "window": 4}, "Spilled"),
        ({"recall": BestBlocks(0.5), "window": 4}, "inside='both'"),
        ({"recall": SameBucket(2), "window": 4}, "inside='both'"),
        ({"recall": SameBucket(2), "inside": "both", "place": DistanceCeiling(4), "window": 4}, "no one hash"),
        ({"place": Regions(9, 1), "sink": 2, "window": 4}, "behind 2 sink frames"),
        ({"place": Regions(9, 10), "window": 4}, "before the end"),
    ],
)
def test_a_refusal_says_what_to_do(parts, reason):
    with pytest.raises(ValueError, match=f"memory: .*{reason}"):
        Memory(**parts)


@pytest.mark.parametrize(
    ("parts", "model", "reason"),
    [
        ({"recall": BestBlocks(0.5), "inside": "both"}, {"reach": 3}, "BestBlocks.*reach"),
        ({"recall": SameBucket(2), "inside": "both"}, {"alibi": torch.ones(2)}, "SameBucket.*ALiBi"),
        ({"fold": Spilled(3, 10**6)}, {"rope": ef.Rope.axial((2, 2, 2))}, "one axis"),
        ({"place": TextFirst(2)}, {"rope": ef.Rope.axial((2, 2, 2, 2))}, "4 axes"),
        ({"place": TextFirst(2)}, {"rope": ROPES[0], "head_dim": 12, "reach": 3}, "reach"),
        ({"fold": LinearState(projection=torch.zeros(1, 8, 8))}, {}, r"projection has shape \(1, 8, 8\); expected \(1, 8, 9\)"),
        ({"fold": Convolved(1, torch.zeros(1, 4)), "window": 4, "inside": "both"}, {}, r"weights have shape \(1, 4\)"),
        ({"evict": ByHeadGroup(((), (2,))), "window": 3}, {}, "key head 2; there are 2"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused_when_the_memory_is_built(parts, model, reason):
    with pytest.raises(ValueError, match=reason):
        Memory(**parts).build(**{"layers": 1, "heads": 2, "head_dim": 8, **model})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: LeastAttended(4, 0), "recent is 0"),
        (lambda: LeastAttended(4, 1, "mean"), "fusion is 'mean'"),
        (lambda: LeastDiverse(0), "total is 0"),
        (lambda: RoundsByModality(1, -1, 1, 1), "text_round is -1"),
        (lambda: Averaged(1.5), "alpha is 1.5"),
        (lambda: Convolved(0), "frames is 0"),
        (lambda: Merged(0.9, "value"), "query, key"),
        (lambda: Thinned(4, 2, 8, observe=3), "observe at most recent"),
        (lambda: Thinned(4, 2, 8, 1.5), "share is 1.5"),
        (lambda: BestBlocks(0), "ratio is 0"),
        (lambda: SameBucket(64), "1 to 63 bits"),
        (lambda: Pages(2, 0), "pages of 1"),
    ],
)
def test_an_answer_that_makes_no_sense_by_itself_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("name", ["frame", "coordinates"])
def test_a_tag_of_as_many_tokens_as_rows_is_that_of_the_tokens(name):
    """Two tokens in two rows, and a tag of two numbers."""
    memory, given = Memory(window=4, recall=Pages(1)), torch.tensor([[3, 0], [1, 2]])
    tag = given if name == "coordinates" else given[0]
    states = [
        memory.build(layers=1, heads=1, head_dim=12, rope=ROPES[0], batch=2, dtype=torch.float64) for _ in range(2)
    ]
    inputs, outs = random_inputs(states[0], 2), []
    for state, value in zip(states, (tag, torch.stack([tag, tag])), strict=True):
        with state.step(2, tags={name: value}):
            outs.append(state.attend(0, *inputs[0]))
    assert torch.equal(*outs)
    wrong = torch.zeros(2, 3) if name == "frame" else torch.zeros(3, 2)
    with pytest.raises(ValueError, match=rf"tag '{name}' has shape"):
        states[0].step(2, tags={name: wrong})
