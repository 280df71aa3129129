"""Rows of one batch answer as each of them alone does, and experts come and go meanwhile."""

import asyncio
import gc
import threading
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
import transformers
from testbed import served
from testbed.served import LONG, MODELS, PROMPTS

from modular_experts.base import Base
from modular_experts.deltas import Dense
from modular_experts.injection import find_sites
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert, open_expert
from modular_experts.routing import KernelRidge
from modular_experts.routing.gates import Softmax
from modular_experts.serving import engine as engines
from modular_experts.serving import experts
from modular_experts.serving.engine import PAGE, Engine, EngineError, Sampling, choose_token


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make_library(tiny_llama_dir, tmp_path_factory.mktemp("served") / "library")


ASKED = [(prompt, model) for prompt in PROMPTS for model in MODELS]


@pytest.fixture(scope="module")
def expected(library, tiny_llama_dir) -> list[str]:
    return [served.generated(tiny_llama_dir, library, *one) for one in ASKED]


@pytest.mark.parametrize("narrow", [False, True])
def test_each_row_of_a_batch_is_answered_as_generate_does(library, tiny_llama_dir, expected, monkeypatch, narrow):
    """Rows share long prompts, wait for each other, and in a narrow batch are read in parts and read again."""
    monkeypatch.setattr(engines, "BATCH_TOKENS", 50 if narrow else 1024)
    settings = {"rows": 3, "cache_tokens": 320} if narrow else {}
    engine, models, tokenizer = served.opened(tiny_llama_dir, library, **settings)
    texts = served.texts_of(engine, models, tokenizer, ASKED)
    assert texts == expected
    by_model = {named: texts[place :: len(MODELS)] for place, named in enumerate(MODELS)}
    assert len({*map(tuple, by_model.values())}) == len(by_model), "the experts say the same"


def tokens_read(engine: Engine) -> list[int]:
    """Return a list to which each pass that begins from now on adds the number of its tokens."""
    counts: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda model, arguments, named: counts.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def test_a_prompt_that_the_base_read_is_read_once_for_all_experts_of_answers(library, tiny_llama_dir) -> None:
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)
    read = tokens_read(engine)
    length = len(tokenizer(LONG)["input_ids"])
    behind = length - (length - 1) // PAGE * PAGE
    assert length > behind + PAGE
    order = ["answers", "few_answers", "base", "answers+few_answers", "lora", "answers", "lora"]

    async def one_after_the_other():
        firsts, texts = [], []
        for model in order:
            read.clear()
            tokens = await served.tokens_of(engine, models, tokenizer, LONG, model)
            firsts.append(read[0])
            texts.append(served.text_of(tokenizer, tokens))
        return firsts, texts

    firsts, texts = served.run(engine, one_after_the_other())
    assert firsts == [length, behind, behind, behind, length, behind, length]
    assert texts == [served.generated(tiny_llama_dir, library, LONG, model) for model in order]


@pytest.mark.parametrize("first", ["answers", "lora", "base"])
def test_an_answer_is_read_again_as_a_part_of_the_next_prompt(library, tiny_llama_dir, first) -> None:
    """The keys and values of an expert's own answer are not the base's, which reads it in the next turn."""
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)
    read = tokens_read(engine)
    prompt = tokenizer(LONG)["input_ids"]

    async def answered(ids: list[int], model: str, most: int) -> list[int]:
        experts = models.find(model).experts
        return [token.id async for token in engine.answer(ids, experts, [-1], most, Sampling())]

    async def two_turns():
        conversation = prompt + await answered(prompt, first, 2 * PAGE)
        read.clear()
        return conversation, await answered(conversation, "few_answers", 12)

    conversation, second = served.run(engine, two_turns())
    shared = {"answers": len(prompt) - 1, "lora": 0, "base": len(conversation) - 1}[first] // PAGE * PAGE
    assert read[0] == len(conversation) - shared
    model = Base.open(str(tiny_llama_dir)).load("float32")
    with attached(model, open_expert(library / "few_answers")):
        whole = model.generate(torch.tensor([conversation]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert second == whole[0, len(conversation) :].tolist()


def test_the_chosen_expert_of_answers_goes_on_from_what_the_base_read(tmp_path, tiny_llama_dir, task_files):
    library = tmp_path / "routed"
    served.router_of(tiny_llama_dir, library, task_files, on_answers=True)(KernelRidge(reject=None, select=Softmax()))
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)
    read = tokens_read(engine)
    prompts = ["upper " + LONG, "reverse " + LONG, "upper " + LONG]

    async def one_after_the_other():
        firsts, texts = [], []
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            choice, _ = models.find("auto").choose(engine.reader, served.plainly(ids))
            assert len(choice.experts) == 2
            engine.check(choice.members, len(ids), 12)
            read.clear()
            answer = engine.answer(ids, choice.experts, [tokenizer.eos_token_id], 12, Sampling())
            texts.append(served.text_of(tokenizer, [token async for token in answer]))
            firsts.append((read[0], len(ids)))
        return firsts, texts

    firsts, texts = served.run(engine, one_after_the_other())
    assert [read == whole for read, whole in firsts] == [True, True, False]
    assert texts == [served.generated(tiny_llama_dir, library, prompt, "route") for prompt in prompts]


def test_experts_of_both_sorts_are_not_added_up(library, tiny_llama_dir) -> None:
    engine, models, _ = served.opened(tiny_llama_dir, library)
    with pytest.raises(ValueError, match="answers acts on answers alone and lora on prompts, too"):
        engine.check(models.find("answers+lora").members, 3, 3)


def test_a_seed_gives_the_same_samples_whatever_else_the_batch_holds(library, tiny_llama_dir) -> None:
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)

    def ask(seed: int, model: str = "lora"):
        return served.tokens_of(engine, models, tokenizer, "upper", model, 20, temperature=1.0, seed=seed)

    async def alone_and_among_others():
        alone = await ask(7)
        return alone, await asyncio.gather(ask(8), ask(7), ask(7, "dense"))

    alone, (other, among, expert) = served.run(engine, alone_and_among_others())
    assert among == alone
    assert other != alone != expert


def test_samples_are_drawn_by_their_probabilities() -> None:
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    for temperature, top_p, kept in ((1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.8, 2), (2.0, 0.01, 1)):
        drawn = [choose_token(logits, Sampling(temperature, top_p), generator).id for _ in range(1000)]
        shares = (logits / temperature).softmax(0)[:kept]
        expected = shares / shares.sum()
        counts = torch.bincount(torch.tensor(drawn), minlength=4)
        assert not counts[kept:].any()
        # Three standard deviations of a binomial distribution.
        assert bool(((counts[:kept] / 1000 - expected).abs() <= 3 * (expected * (1 - expected) / 1000).sqrt()).all())
    # A temperature near zero takes the likeliest token.
    likely = torch.tensor([1.0, 30.0, 2.0])
    assert {choose_token(likely, Sampling(heat), generator).id for heat in (1e-3, 1e-40, 5e-324)} == {1}


def test_logprobs_are_those_of_a_pass_over_the_whole_text(library, tiny_llama_dir) -> None:
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)
    tokens = served.run(engine, served.tokens_of(engine, models, tokenizer, "upper", "lora", 5, logprobs=3))
    prompt = tokenizer("upper")["input_ids"]
    model = Base.open(str(tiny_llama_dir)).load("float32")
    with torch.no_grad(), open_expert(library / "lora").apply_to(model):
        whole = model(torch.tensor([prompt + [token.id for token in tokens]])).logits[0].log_softmax(1)
    for place, token in enumerate(tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(float(whole[place, token.id]), abs=1e-4)
        values, ids = whole[place].topk(3)
        assert [number for number, _ in token.likeliest] == ids.tolist()
        assert [value for _, value in token.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def sizes(library: Path) -> dict[str, int]:
    return {name: sum(open_expert(library / name).stored_bytes().values()) for name in served.FORMS}


def test_experts_that_nobody_asked_for_lately_leave_and_others_wait_for_room(library, tiny_llama_dir) -> None:
    most = sum(sizes(library)[name] for name in ("dense", "lora", "int4")) - 1
    engine, models, tokenizer = served.opened(tiny_llama_dir, library, expert_bytes=most)

    async def ask(model: str):
        return await served.tokens_of(engine, models, tokenizer, "upper", model)

    async def one_after_the_other():
        held = []
        for model in ("lora", "int4", "lora", "dense"):
            await ask(model)
            held.append({slot.expert.name for slot in engine.experts._slots.values()})
        # Both together do not fit, so one answers after the other.
        return held, await asyncio.gather(ask("dense"), ask("entries+tiles"))

    held, answers = served.run(engine, one_after_the_other())
    assert held == [{"lora"}, {"lora", "int4"}, {"lora", "int4"}, {"lora", "dense"}]
    texts = [served.text_of(tokenizer, tokens) for tokens in answers]
    assert texts == [served.generated(tiny_llama_dir, library, "upper", name) for name in ("dense", "entries+tiles")]
    most = sizes(library)["lora"] + sizes(library)["entries"] - 1
    small, models, _ = served.opened(tiny_llama_dir, library, expert_bytes=most)
    for model, names in (("dense", "dense"), ("lora+entries", "lora and entries")):
        with pytest.raises(ValueError, match=f"{names} would take .* are for all experts; give more with `expert_b"):
            small.check(models.find(model).members, 1, 1)


@pytest.mark.parametrize("has_room", [True, False])
def test_an_expert_stays_decoded_after_its_answer_as_long_as_there_is_room(library, tiny_llama_dir, has_room) -> None:
    most = 2**30 if has_room else sizes(library)["int4"] + sizes(library)["lora"] + 500
    engine, models, tokenizer = served.opened(tiny_llama_dir, library, expert_bytes=most)

    async def one_after_the_other():
        for model in ("int4", "lora", "int4", "lora"):
            await served.tokens_of(engine, models, tokenizer, "upper", model)
        assert {slot.expert.name for slot in engine.experts._slots.values()} == {"int4", "lora"}
        held = [one for _, mixture in engine.experts._mixtures.values() for one in mixture.deltas if one is not None]
        return {one._formed is not None for one in held if one.is_encoded}

    assert served.run(engine, one_after_the_other()) == {has_room}


async def tokens_with(engine: Engine, expert: StoredExpert) -> list[int]:
    engine.check([expert], 3, 3)
    return [token.id async for token in engine.answer([3, 4, 5], [(expert, 1.0)], [-1], 3, Sampling())]


def test_an_expert_of_other_weights_joins_those_that_stayed_when_others_left(tiny_llama_dir, tmp_path) -> None:
    """It gives more layers mixtures, which have a place for each number that is in use."""
    weights = dict(served.WEIGHTS)
    name, shape = weights.popitem()
    three = [served.write(tiny_llama_dir, tmp_path / f"{seed}", "lora", seed, weights) for seed in range(3)]
    first, second, third = three
    wider = {name: shape, name.replace("1", "0"): shape}
    other = served.write(tiny_llama_dir, tmp_path / "other", "lora", shapes=wider)
    # Three of equal size fit; the other one is larger, and takes the place of two.
    size = sum(third.stored_bytes().values())
    engine = Engine(Base.open(str(tiny_llama_dir)).load("float32"), expert_bytes=3 * size)

    async def one_after_the_other():
        before = [await tokens_with(engine, one) for one in three]
        await tokens_with(engine, other)
        numbers = {slot.expert.name: slot.number for slot in engine.experts._slots.values()}
        return before, [await tokens_with(engine, one) for one in (third, first, second)], numbers

    before, after, numbers = served.run(engine, one_after_the_other())
    assert numbers == {"2": 2, "other": 0}
    assert after == [before[2], before[0], before[1]]


def test_an_expert_of_the_head_is_refused(tiny_llama_dir, tmp_path) -> None:
    model = Base.open(str(tiny_llama_dir)).load("float32")
    shapes = {"lm_head.weight": model.lm_head.weight.shape}
    head = served.write(tiny_llama_dir, tmp_path / "head", "lora", shapes=shapes)
    with pytest.raises(ValueError, match=r"it moves lm_head\.weight, which all rows share; apply it to the base"):
        Engine(model).check([head], 3, 3)


def test_only_the_decoded_form_of_an_expert_is_counted_as_decoded(library, tiny_llama_dir) -> None:
    """A bias has no decoded form, and an expert whose client left before a pass decoded it is not kept decoded."""
    engine, models, _ = served.opened(tiny_llama_dir, library)
    held = engine.experts
    for name in ("lora", "int4"):
        held.give_back(held.take(models.find(name).members))
    for _, mixture in held._mixtures.values():
        mixture.put(0, None, Dense(torch.ones(mixture.like.numel() + 32)))
    held.take(models.find("tiles").members)
    assert [slot.decoded for slot in held._slots.values()] == [0, 0, None]
    assert held.gates.kept == {2}


def test_whoever_leaves_early_or_late_frees_experts_and_row(library, tiny_llama_dir, expected, monkeypatch) -> None:
    engine, models, tokenizer = served.opened(tiny_llama_dir, library, rows=1)
    reading, go_on, take = threading.Event(), threading.Event(), engine.experts.take

    def slow(experts):
        reading.set()
        assert go_on.wait(30)
        return take(experts)

    async def leave():
        with monkeypatch.context() as slowed:
            slowed.setattr(engine.experts, "take", slow)
            task = asyncio.create_task(served.tokens_of(engine, models, tokenizer, "upper", "lora"))
            await asyncio.to_thread(reading.wait)
            for _ in range(3):  # a stream's task is cancelled in each turn of the loop until it ends
                task.cancel()
                await asyncio.sleep(0.01)
            assert task.cancelled()
            go_on.set()
        while not engine.experts:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert [slot.users for slot in engine.experts._slots.values()] == [0]
        chosen = models.find("lora").experts
        async with aclosing(engine.answer([5, 6], chosen, [-1], 200, Sampling())) as tokens:
            async for _ in tokens:
                break
        assert engine.answering == 0
        assert [slot.users for slot in engine.experts._slots.values()] == [0]
        assert not engine._manager.output_router.result_handlers
        # The only row is free.
        return await served.tokens_of(engine, models, tokenizer, *ASKED[0])

    assert served.text_of(tokenizer, served.run(engine, leave())) == expected[0]


def test_a_request_is_checked_without_the_layers_which_a_thread_may_change(library, tiny_llama_dir, monkeypatch):
    engine, models, _ = served.opened(tiny_llama_dir, library)

    def changing(*given, **named):
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(engine.model, "named_parameters", changing)
    monkeypatch.setattr(engine.model, "named_modules", changing)
    checked = {name: engine.check(models.find(name).members, 1, 1) for name in served.FORMS}
    assert checked == dict.fromkeys(served.FORMS)


def test_an_expert_is_given_back_while_another_one_is_read(library, tiny_llama_dir, monkeypatch) -> None:
    """The loop of the server does so, and would stand still."""
    held, models, _ = served.opened(tiny_llama_dir, library)
    slots = held.experts.take(models.find("lora").members)
    reading, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(experts, "oriented_delta", lambda *_, **__: reading.set() or (go_on.wait(30) and None))
    thread = threading.Thread(target=held.experts.take, args=(models.find("dense").members,))
    thread.start()
    assert reading.wait(30)
    giving = threading.Thread(target=held.experts.give_back, args=(slots,))
    giving.start()
    giving.join(5)
    waits = giving.is_alive()
    go_on.set()
    thread.join()
    giving.join()
    assert not waits


def test_requests_take_experts_in_the_order_in_which_they_came(library, tiny_llama_dir) -> None:
    """One that needs all the room is not overtaken for ever by those that need little."""
    most = sizes(library)["dense"] + 100
    engine, models, tokenizer = served.opened(tiny_llama_dir, library, expert_bytes=most)
    ended = []

    async def ask(model: str, tokens: int):
        await served.tokens_of(engine, models, tokenizer, "upper", model, tokens)
        ended.append(model)

    async def all_of_them():
        tasks = [asyncio.create_task(ask("lora", 30))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(ask(*one)) for one in (("dense", 1), ("base", 1))]
        for _ in range(3):
            await asyncio.sleep(0.01)
            tasks.append(asyncio.create_task(ask("lora", 30)))
        await asyncio.gather(*tasks)

    served.run(engine, all_of_them())
    assert ended == ["base", "lora", "dense", "lora", "lora", "lora"]


def test_an_old_request_ends_on_the_expert_that_a_new_one_replaces(tiny_llama_dir, tmp_path) -> None:
    place = tmp_path / "library"
    served.write(tiny_llama_dir, place / "one", "entries", 1, encoding="int4")
    before = served.generated(tiny_llama_dir, place, LONG, "one", 60)
    engine, models, tokenizer = served.opened(tiny_llama_dir, place)

    async def replaced_meanwhile():
        old = served.tokens_of(engine, models, tokenizer, LONG, "one", 60)
        task = asyncio.create_task(old)
        while not engine.answering:
            await asyncio.sleep(0.001)
        served.write(tiny_llama_dir, place / "one", "lora", 2, overwrite=True)
        found = await served.tokens_of(engine, models, tokenizer, LONG, "one", 60), await task
        expected = served.generated(tiny_llama_dir, place, LONG, "one", 60)
        await served.tokens_of(engine, models, tokenizer, LONG, "one", 1)
        assert len(engine.experts) == 1, "what was replaced fills the memory"
        return expected, *[served.text_of(tokenizer, tokens) for tokens in found]

    expected, new, old = served.run(engine, replaced_meanwhile())
    assert old == before
    assert new == expected != before


def test_a_slow_reader_keeps_one_output_in_memory(library, tiny_llama_dir) -> None:
    """Each of transformers' outputs holds all tokens so far, and thousands would wait for whoever stops reading."""
    engine, _, _ = served.opened(tiny_llama_dir, library)

    async def read_slowly():
        read, kept = [], 0
        async with aclosing(engine.answer([5, 6], [], [-1], 12, Sampling())) as tokens:
            async for token in tokens:
                read.append(token.id)
                while len(read) == 1 and engine._manager.output_router.result_handlers:
                    await asyncio.sleep(0.01)
                kept = max(kept, sum(type(one).__name__ == "GenerationOutput" for one in gc.get_objects()))
        return len(read), kept

    assert served.run(engine, read_slowly()) == (12, 2)


def test_a_model_that_fails_ends_its_requests_and_answers_the_next(library, tiny_llama_dir, monkeypatch, caplog):
    engine, models, tokenizer = served.opened(tiny_llama_dir, library)

    async def fail_once():
        with monkeypatch.context() as broken:
            broken.setattr(engines, "_gates", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="division by zero"):
                await served.tokens_of(engine, models, tokenizer, "upper", "lora")
        return await served.tokens_of(engine, models, tokenizer, "upper", "lora")

    answer = served.text_of(tokenizer, served.run(engine, fail_once()))
    assert answer == served.generated(tiny_llama_dir, library, "upper", "lora")


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_bases_of_other_architectures_answer_as_generate_does(tiny, tmp_path, architecture) -> None:
    base = tiny(architecture)
    engine, models, tokenizer = served.opened(base, tmp_path)
    weights = [site.weight for site in find_sites(engine.model) if not site.by_name_only]
    shapes = Base.open(base).structure.shapes
    served.write(base, tmp_path / "lora", "lora", shapes={name: shapes[name] for name in weights})
    asked = [(prompt, model) for prompt in PROMPTS[:2] for model in ("base", "lora")]
    engine.check_base()
    texts = served.texts_of(engine, models, tokenizer, asked)
    assert texts == [served.generated(base, tmp_path, *one) for one in asked]


def test_a_base_that_transformers_does_not_batch_is_refused_with_one_sentence(tiny, tmp_path, caplog) -> None:
    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    for model in (transformers.MambaForCausalLM(config), Base.open(str(tiny("neox"))).load("float32")):
        with pytest.raises(ValueError, match=f"transformers does not batch the rows of {type(model).__name__} \\("):
            Engine(model).check_base()
    with pytest.raises(ValueError, match="Gemma2ForCausalLM cannot be served, because transformers leaves out attn_l"):
        Engine(Base.open(str(tiny("gemma2"))).load("float32"))
    assert caplog.text == ""
