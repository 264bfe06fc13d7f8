"""Each figure of the likelihood table against its definition, computed block by block."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ltm_hf import LTMConfig, LTMForCausalLM, elbo, infer_posterior
from ltm_hf.data import document_blocks, pack, prefix_blocks, train_tokenizer
from ltm_hf.evaluation import Likelihood, evaluate_documents, evaluate_likelihood, markdown_table, score_blocks
from ltm_hf.evaluation.likelihood import DEFAULT, EXACT, MEMORY, default_figures
from ltm_hf.likelihood_ltm import Text
from ltm_hf.memory_ltm import prior_state, token_noise
from ltm_hf.posterior_ltm import LatentPosterior, keyed_normal, sequence_keys

LENGTH = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LTMForCausalLM(
        LTMConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, sliding_window=4, num_latents=4, latent_reader="paper", bos_token_id=1,
            eos_token_id=0, initializer_range=0.3, num_inference_steps=4,
        )
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def memory(make_model):
    return make_model(max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def blocks():
    ids = torch.randint(2, 61, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row} for row in ids.tolist()]


def token_losses(model, ids, latents=None, **memory):
    """Nats of the tokens of one block after the first, with log-softmax written out."""
    with torch.no_grad():
        logits = model(ids[None], latents=latents, **memory).logits[0, :-1]
    return -torch.log_softmax(logits, dim=-1)[torch.arange(len(ids) - 1), ids[1:]]


def test_figures_against_their_definitions(model, blocks):
    likelihood = evaluate_likelihood(model, blocks, batch_size=2, progress=False)
    expected = {name: [] for name in likelihood.figures}
    for block in blocks:
        ids = torch.tensor(block["input_ids"])
        posterior = infer_posterior(model, ids[None])
        estimate = elbo(model, ids[None], posterior)
        plain = token_losses(model, ids)
        thought = infer_posterior(model, ids[None, : LENGTH // 2]).mean
        expected["bound"].append((estimate.nll + estimate.kl).item() / (LENGTH - 1))
        expected["nll"].append(estimate.nll.item() / (LENGTH - 1))
        expected["kl"].append(posterior.kl_divergence().item() / (LENGTH - 1))
        expected["no_latents"].append(plain.mean().item())
        expected["prefix"].append(token_losses(model, ids, thought)[LENGTH // 2 - 1 :].mean().item())
        expected["prefix_no_latents"].append(plain[LENGTH // 2 - 1 :].mean().item())
        keys = sequence_keys(ids[None], torch.ones_like(ids[None]))
        noise = keyed_normal(keys, model.config.latent_shape, 0)
        fitted = infer_posterior(model, ids[None], epsilon=noise)
        nll = token_losses(model, ids, fitted.reparameterize(noise)).sum()
        expected["released"].append(math.exp((nll + fitted.kl_divergence()).item() / (LENGTH - 1)))
    expected["released"] = [math.log(sum(expected["released"]) / len(blocks))]
    for name, values in expected.items():
        assert likelihood[name] == pytest.approx(sum(values) / len(values), abs=1e-4), name
    assert likelihood.num_tokens == 5 * (LENGTH - 1) and likelihood.num_blocks == 5


def test_figures_of_a_memory_against_their_definitions(memory, blocks):
    """Each token by a forward pass of its own over what comes before it; noise as training's, by the seed."""
    likelihood = evaluate_likelihood(memory, blocks, batch_size=2, seed=3, progress=False)
    assert tuple(likelihood.figures) == MEMORY and "NOT a bound" not in markdown_table({"m": likelihood})
    expected = {name: [] for name in MEMORY}
    for block in blocks:
        ids = torch.tensor(block["input_ids"])
        start = dict(latent_state=prior_state(memory.config, 1))
        exact = torch.stack([token_losses(memory, ids[: end + 1], **start)[-1] for end in range(1, LENGTH)])
        noise = token_noise(Text.of(memory, ids[None]).keys, LENGTH, None, 32, 3)
        plain, thought = token_losses(memory, ids), infer_posterior(memory, ids[None, : LENGTH // 2]).mean
        after = slice(LENGTH // 2 - 1, None)
        expected["prediction"].append(exact.mean())
        expected["prediction_sampled"].append(token_losses(memory, ids, **start, latent_noise=noise).mean())
        expected["no_latents"].append(plain.mean())
        expected["prefix"].append(token_losses(memory, ids, thought)[after].mean())
        expected["prefix_prediction"].append(exact[after].mean())
        expected["prefix_no_latents"].append(plain[after].mean())
    means = {name: torch.stack(values).mean().item() for name, values in expected.items()}
    assert {name: likelihood[name] for name in MEMORY} == pytest.approx(means, abs=1e-4)
    assert len({round(mean, 2) for mean in means.values()}) == 6  # and no two of them are the same


def test_a_longer_look_at_the_prefix_changes_its_figure_alone(memory, blocks):
    few, many = (evaluate_likelihood(memory, blocks, num_inference_steps=n, progress=False) for n in (1, 3))
    assert [name for name in MEMORY if few[name] != many[name]] == ["prefix"]
    none = evaluate_likelihood(memory, blocks, num_inference_steps=0, progress=False)
    assert none["prefix"] == pytest.approx(none["prefix_no_latents"])


@pytest.mark.parametrize(
    ("overrides", "figures"),
    [
        ({}, MEMORY),
        ({"latent_reader": "paper"}, DEFAULT),
        (
            {"latent_reader": "paper", "inference_method": "langevin"},
            ("nll", "no_latents", "prefix", "prefix_no_latents"),
        ),
        ({"num_latents": 0}, EXACT),
    ],
)
def test_what_is_measured_of_a_model(make_model, overrides, figures):
    assert default_figures(make_model(**overrides)) == figures


def test_a_figure_of_the_other_reader_is_refused(model, memory, blocks):
    for one, name in ((model, "prediction"), (model, "prefix_prediction"), (memory, "released")):
        with pytest.raises(ValueError, match=f"'{name}' is no figure of a model with latent_reader="):
            score_blocks(one, blocks, figures=[name])


def test_prefix_does_not_see_what_it_predicts(model, blocks):
    """Another last token changes the figure by that token's own loss and no more: the latents did not know it."""
    ids = torch.tensor(blocks[0]["input_ids"])
    changed = torch.cat((ids[:-1], torch.tensor([(ids[-1] + 1) % 61])))
    thought = infer_posterior(model, ids[None, : LENGTH // 2]).mean
    difference = (token_losses(model, changed, thought) - token_losses(model, ids, thought)).sum().item()
    before, after = (
        evaluate_likelihood(model, [{"input_ids": these.tolist()}] * 2, progress=False) for these in (ids, changed)
    )
    assert abs(difference) > 1e-3
    assert (after["prefix"] - before["prefix"]) * (LENGTH // 2) == pytest.approx(difference, abs=1e-4)


def test_mixture_of_the_prefix_averages_probabilities(model, blocks):
    scores = score_blocks(model, blocks, 2, num_inference_steps=3, progress=False, figures=["prefix_mixture-3"])
    first, wanted = LENGTH // 2, []
    for block in blocks:
        ids = torch.tensor(block["input_ids"])
        posterior = infer_posterior(model, ids[None, :first], num_inference_steps=3)
        losses = [token_losses(model, ids, posterior.scoring_sample(k, 0))[first - 1 :].sum() for k in range(3)]
        wanted.append(-math.log(sum(math.exp(-loss) for loss in losses) / 3))
    assert scores.nats["prefix_mixture-3"].tolist() == pytest.approx(wanted, rel=1e-4)
    single = score_blocks(model, blocks, num_inference_steps=0, progress=False, figures=["prefix", "prefix_mixture-1"])
    assert single.mean("prefix_mixture-1")[0] != single.mean("prefix")[0]  # a sample, not the mean
    with pytest.raises(ValueError, match="There is no figure 'prefix_mixture-0'"):
        score_blocks(model, blocks, figures=["prefix_mixture-0"])


@pytest.mark.parametrize("every", [1, 5, LENGTH])
def test_a_predictor_that_infers_anew(model, blocks, every):
    """Each token given latents of all that came before its part of the text; of the first part, latents of zero."""
    short = [*blocks[:2], {"input_ids": blocks[2]["input_ids"][: LENGTH - 3]}]  # padded
    scores = score_blocks(model, short, 3, num_inference_steps=2, progress=False, figures=[f"reinfer-{every}"])
    for block, nats in zip(short, scores.nats[f"reinfer-{every}"].tolist(), strict=True):
        ids, wanted = torch.tensor(block["input_ids"]), 0.0
        for place in range(1, len(ids)):
            known = 1 + (place - 1) // every * every
            thought = infer_posterior(model, ids[None, :known], num_inference_steps=2).mean
            assert known > 1 or not thought.any()
            wanted += token_losses(model, ids, thought)[place - 1].item()
        assert nats == pytest.approx(wanted, rel=1e-5)


def test_standard_error_is_over_blocks(model, blocks):
    likelihood = evaluate_likelihood(model, blocks, progress=False)
    losses = torch.stack([token_losses(model, torch.tensor(block["input_ids"])).mean() for block in blocks])
    assert likelihood.figures["no_latents"][1] == pytest.approx((losses.std() / math.sqrt(5)).item(), rel=1e-4)


def test_the_released_protocol_flatters(model, blocks):
    """With enough steps the fit learns the one draw of noise, and scoring with that draw hides it."""
    likelihood = evaluate_likelihood(model, blocks, num_inference_steps=64, progress=False)
    assert likelihood["released"] < likelihood["bound"]


def test_baseline_has_exact_losses_only(blocks):
    config = LTMConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_latents=0)
    likelihood = evaluate_likelihood(LTMForCausalLM(config), blocks, progress=False)
    assert list(likelihood.figures) == ["no_latents", "prefix_no_latents"]


def test_table_names_what_each_figure_is(model, blocks):
    likelihood = evaluate_likelihood(model, blocks, progress=False)
    table = markdown_table({"mine": likelihood})
    assert "NOT a bound" in table and "fresh noise" in table and f"{likelihood['bound']:.3f}" in table
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_restores_training_mode_and_refuses_an_empty_set(model, blocks):
    model.train()
    evaluate_likelihood(model, blocks[:2], progress=False)
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="no block"):
        evaluate_likelihood(model, [], progress=False)


@pytest.mark.parametrize("kind", ["model", "memory"])
def test_a_block_gets_the_same_figures_in_any_batch_and_padded(kind, request):
    """Of blocks of different lengths, each with a prefix of its own."""
    model = request.getfixturevalue(kind)
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_ids": torch.randint(2, 61, (length,), generator=generator).tolist(),
            "token_bytes": [0] + [2] * (length - 1),
            "document": length % 3,
            "prefix_length": prefix,
        }
        for length, prefix in ((12, 6), (3, 1), (7, 6), (2, 1), (9, 2))
    ]
    names = ("bound", "nll", "kl", "iw-3", "prior", *set(default_figures(model)) - {"bound", "nll", "kl"})
    together = score_blocks(model, rows, batch_size=4, progress=False, figures=names)
    for index, row in enumerate(rows):
        alone = score_blocks(model, [row], progress=False, figures=names)
        for name in names:
            assert together.nats[name][index].item() == pytest.approx(alone.nats[name].item(), abs=2e-4), name
    ids = torch.tensor(rows[4]["input_ids"])
    thought = infer_posterior(model, ids[None, :2]).mean
    with torch.no_grad():
        logits = model(ids[None], latents=thought).logits[0, 1:-1]
    after = -torch.log_softmax(logits, dim=-1)[torch.arange(7), ids[2:]]
    assert together.nats["prefix"][4].item() == pytest.approx(after.sum().item(), abs=1e-4)
    assert together.tokens("prefix").tolist() == [6, 2, 1, 1, 7]
    assert together.bytes("bound").tolist() == [22, 4, 12, 2, 16]
    likelihood = together.likelihood()
    total = sum(together.nats["bound"]).item()
    assert likelihood["bound"] == pytest.approx(total / 28)
    assert likelihood.bits_per_byte["bound"][0] == pytest.approx(total / math.log(2) / 56)
    assert likelihood.num_documents == 3 and likelihood.num_blocks == 5


def test_prior_is_a_draw_that_ignores_the_text(model, blocks):
    """On average over many texts as good as any other draw, and the same whatever the fit."""
    few, many = (
        score_blocks(model, blocks, num_inference_steps=steps, progress=False, figures=["prior"]) for steps in (1, 9)
    )
    assert torch.equal(few.nats["prior"], many.nats["prior"])
    plain = score_blocks(model, blocks, progress=False, figures=["no_latents"]).nats["no_latents"]
    assert (few.nats["prior"] - plain).abs().min() > 1e-3


def test_other_causal_models_by_the_same_call(blocks):
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    llama = LlamaForCausalLM(config).eval()
    likelihood = evaluate_likelihood(llama, blocks, progress=False)
    assert list(likelihood.figures) == ["no_latents", "prefix_no_latents"]
    ids = torch.tensor([block["input_ids"] for block in blocks])
    with torch.no_grad():
        assert likelihood["no_latents"] == pytest.approx(llama(ids, labels=ids).loss.item(), abs=1e-5)


def test_a_single_block_has_no_error(model, blocks):
    likelihood = evaluate_likelihood(model, blocks[:1], progress=False)
    assert math.isnan(likelihood.figures["bound"][1]) and "nan" not in markdown_table({"mine": likelihood})


def test_perplexity_pools_tokens():
    likelihood = Likelihood({"bound": (2.0, 0.1), "kl": (1e4, 0.0)}, 10, 2)
    assert likelihood.perplexity("bound") == math.exp(2.0) and likelihood.perplexity("kl") == math.inf
    both = likelihood | Likelihood({"iw-8": (1.9, 0.1)}, 5, 1)
    assert list(both.figures) == ["bound", "iw-8", "kl"] and both.num_tokens == 10


def test_more_particles_average_the_same_bound(model, blocks):
    ids = torch.tensor([block["input_ids"] for block in blocks])
    posterior = infer_posterior(model, ids)
    narrow = LatentPosterior(posterior.mean, torch.full_like(posterior.mean, -30.0), keys=posterior.keys)
    with torch.no_grad():
        one, many = (elbo(model, ids, narrow, num_particles=count).nll for count in (1, 3))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)  # without variance there is nothing to average


@pytest.fixture(scope="module")
def texts():
    words = ["the", "people", "of", "these", "states", "have", "peace", "and", "war", "with", "all"]
    generator = torch.Generator().manual_seed(2)
    return [" ".join(words[i] for i in torch.randint(11, (length,), generator=generator)) for length in (4, 30, 9, 70)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 290)


@pytest.fixture(scope="module")
def reader(tokenizer):
    """A model of that vocabulary."""
    torch.manual_seed(0)
    config = LTMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, sliding_window=4, num_latents=4, latent_reader="paper", initializer_range=0.3,
        num_inference_steps=2,
    )  # fmt: skip
    return LTMForCausalLM(config).eval()


def test_documents(reader, tokenizer, texts):
    """Each group of figures is of the blocks that it says; bits and nats are of the same text."""
    likelihood, notes = evaluate_documents(reader, tokenizer, texts, num_samples=2, progress=False)
    names = [
        "bound", "iw-2", "nll", "kl", "no_latents", "prior", "prefix", "prefix_no_latents", "released",
    ]  # fmt: skip
    assert list(likelihood.figures) == names and notes == [] and likelihood.num_documents == 4
    whole = score_blocks(reader, document_blocks(texts, tokenizer, 16), progress=False, figures=["bound"])
    assert likelihood.figures["bound"] == pytest.approx(whole.mean("bound"), rel=1e-5)
    size = sum(len(text.encode()) for text in texts)
    nats = whole.nats["bound"].sum().item()
    assert likelihood.bits_per_byte["bound"][0] == pytest.approx(nats / math.log(2) / size)
    after = score_blocks(reader, prefix_blocks(texts, tokenizer, 16), progress=False, figures=["prefix"])
    assert likelihood.figures["prefix"] == pytest.approx(after.mean("prefix"), rel=1e-5)
    joined = pack(Dataset.from_dict({"text": texts}), tokenizer, 16)
    released = evaluate_likelihood(reader, joined, progress=False, figures=["released"])
    assert likelihood["released"] == pytest.approx(released["released"], rel=1e-5)
    assert "released" not in likelihood.bits_per_byte and "kl" not in likelihood.bits_per_byte


def test_documents_by_a_memory(make_model, tokenizer, texts):
    memory = make_model(vocab_size=len(tokenizer), max_position_embeddings=16)
    likelihood, notes = evaluate_documents(memory, tokenizer, texts, progress=False)
    assert tuple(likelihood.figures) == MEMORY and notes == []
    for name, rows in (("prediction", document_blocks), ("prefix_prediction", prefix_blocks)):
        scores = score_blocks(memory, rows(texts, tokenizer, 16), progress=False, figures=[name])
        assert likelihood.figures[name] == pytest.approx(scores.mean(name), rel=1e-5)
    assert likelihood.bits_per_byte.keys() == set(MEMORY)
    with pytest.raises(ValueError, match="num_samples is of an importance-weighted bound, and this model has no bound"):
        evaluate_documents(memory, tokenizer, texts, num_samples=2)


def test_documents_without_what_a_figure_needs(reader, tokenizer, texts):
    likelihood, notes = evaluate_documents(reader, tokenizer, ["a", texts[1]], prefix_length=8, progress=False)
    assert notes == ["1 of 2 documents are too short to have anything after their prefix."] and "prefix" in likelihood
    likelihood, notes = evaluate_documents(reader, tokenizer, ["a b"], prefix_length=8, progress=False)
    assert "prefix" not in likelihood and "released" not in likelihood and "bound" in likelihood
    assert len(notes) == 2 and "do not fill one block of 16 tokens" in notes[1]
    with pytest.raises(ValueError, match="Document 1 has no text"):
        evaluate_documents(reader, tokenizer, ["a", " "], progress=False)


def test_so_many_blocks_are_drawn_by_the_seed(reader, tokenizer, texts):
    first, again, other = (
        evaluate_documents(reader, tokenizer, texts, num_blocks=3, seed=seed, progress=False)[0] for seed in (0, 0, 1)
    )
    assert first.figures["no_latents"] == again.figures["no_latents"] != other.figures["no_latents"]
    assert first.num_blocks == 3


def test_units():
    likelihood = Likelihood({"bound": (math.log(20.0), 0.1), "kl": (0.5, math.nan)}, 9, 1, 1, {"bound": (1.5, 0.2)})
    cells = {
        unit: [line.split("|")[1:3] for line in markdown_table({"m": likelihood}, unit).splitlines()[2:]]
        for unit in ("nats a token", "perplexity", "bits per byte")
    }
    stripped = {unit: [[cell.strip() for cell in row] for row in rows] for unit, rows in cells.items()}
    assert stripped["nats a token"] == [["bound", "2.996 ± 0.100"], ["kl", "0.500"]]
    assert stripped["perplexity"] == [["bound", "20.00 ± 2.00"]]
    assert stripped["bits per byte"] == [["bound", "1.500 ± 0.200"]]
