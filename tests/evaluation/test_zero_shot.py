import json
import math

import pytest

from ltm_hf.evaluation.likelihood import Likelihood
from ltm_hf.evaluation.zero_shot import PUBLISHED, ZERO_SHOT, load_zero_shot, plot_zero_shot, zero_shot_table


@pytest.mark.parametrize(
    ("name", "tokenised", "text"),
    [
        ("PTB", " mr. <unk> 's board did n't say $ N million ", "mr. <unk>'s board didn't say $N million"),
        ("PTB", " the viewers ' opinions for N % of it ", "the viewers' opinions for N% of it"),
        ("WikiText", ' He said : " It was 3 @.@ 5 " , a well @-@ known one', 'He said: "It was 3.5", a well-known one'),
        ("WikiText", " the stars ' roles ( in 1 @,@ 000 ) ; it 's ", "the stars' roles (in 1,000); it's"),
        ("WikiText", " = = Early life = = ", "== Early life =="),
        ("LM1B", "`` I do n't know , '' she said -LRB- twice -RRB- .", '"I don\'t know," she said (twice).'),
        ("LM1B", "It cost $ 5 million ; why ?", "It cost $5 million; why?"),
        ("LAMBADA", "“ It ’s ”", '" It \'s "'),
        ("PubMed", "it was ( @xmath0 ) ,  as shown [ @xcite ] .", "it was (@xmath0), as shown [@xcite]."),
        ("AG News", " Oil rises. ", "Oil rises."),
    ],
)
def test_detokenised(name, tokenised, text):
    assert ZERO_SHOT[name].detokenize(tokenised) == text


def write(path, *lines):
    path.parent.mkdir(parents=True)
    path.write_text("".join(line + "\n" for line in lines))


def test_documents_of_local_files(tmp_path):
    write(tmp_path / "ptb/ptb.valid.txt", *(f" sentence {number} " for number in range(90)))
    write(tmp_path / "wikitext2/wiki.test.raw.txt", " = One = ", " a . ", " = = Part = = ", " b ", " = Two = ", " c ")
    write(tmp_path / "lambada/lambada_test.jsonl", json.dumps({"text": "a b"}), json.dumps({"text": " "}))
    texts, source = load_zero_shot("PTB", tmp_path)
    assert len(texts) == 3 and texts[0].startswith("sentence 0\nsentence 1\n") and texts[2].endswith("sentence 89")
    assert source == "ptb/ptb.valid.txt"
    texts, source = load_zero_shot("WikiText", tmp_path)
    assert texts == ["= One =\na.\n== Part ==\nb", "= Two =\nc"] and "test split" in source
    assert load_zero_shot("LAMBADA", tmp_path)[0] == ["a b"]


def test_choice_of_documents_is_seeded(tmp_path):
    write(tmp_path / "ag_news/test.jsonl", *(json.dumps({"text": str(number)}) for number in range(50)))
    first, again, other = (load_zero_shot("AG News", tmp_path, 5, seed)[0] for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 5


def test_refuses_by_name(tmp_path):
    with pytest.raises(ValueError, match="no zero-shot data set 'C4'; there are PTB"):
        load_zero_shot("C4", tmp_path)
    with pytest.raises(FileNotFoundError, match="LM1B: there is no lm1b/"):
        load_zero_shot("LM1B", tmp_path)
    write(tmp_path / "pubmed/test.jsonl", json.dumps({"title": "a"}))
    with pytest.raises(ValueError, match="PubMed: test.jsonl has no column 'article', only title"):
        load_zero_shot("PubMed", tmp_path)
    write(tmp_path / "lambada/lambada_test.jsonl", json.dumps({"text": " "}))
    with pytest.raises(ValueError, match="LAMBADA: there is no document with any text"):
        load_zero_shot("LAMBADA", tmp_path)


@pytest.fixture
def results():
    figures = {"bound": (math.log(30.0), 0.01), "released": (math.log(20.0), 0.01), "prefix": (math.log(40.0), 0.1)}
    bits = {"bound": (1.25, 0.02)}
    return {
        "mine": {"PTB": Likelihood(figures, 100, 2, 2, bits), "Arxiv": Likelihood({"bound": (800.0, 0.0)}, 9, 1)},
        "gpt2": {"PTB": Likelihood({"no_latents": (math.log(50.0), 0.02)}, 100, 2, 2, {"no_latents": (1.3, 0.01)})},
    }


def test_table_shows_measured_beside_published_and_calls_things_by_name(results):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in zero_shot_table(results).splitlines()]
    assert ["model", "figure", "PTB", "Arxiv"] in rows
    protocol = "released protocol, not a bound; for comparison with published tables only"
    assert ["mine", protocol, "20.00", "–"] in rows
    assert ["mine", "≤, bound with fresh noise", "30.00", "inf"] in rows
    assert ["gpt2", "exact, no latents", "50.00", "–"] in rows
    assert ["LTM-Small, published", protocol, "34.71", "21.67"] in rows
    assert ["MD4, published", "", "66.07", "–"] in rows
    assert ["mine", "≤, bound with fresh noise", "1.250 ± 0.020", "–"] in rows
    assert all(len(values) == len(ZERO_SHOT) == 7 for values in PUBLISHED.values())


def test_picture(results, tmp_path):
    pytest.importorskip("matplotlib")
    plot_zero_shot(results, tmp_path / "zero_shot.png")
    assert (tmp_path / "zero_shot.png").read_bytes().startswith(b"\x89PNG")
