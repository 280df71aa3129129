"""Experts through the hub: the real client against a server on this machine (`hub_server`)."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from testbed.hub_server import point_client
from testbed.random_deltas import random_delta

from modular_experts.__main__ import main
from modular_experts.deltas import Sparse
from modular_experts.library import Library, make_record, open_expert, write_expert, write_statistics
from modular_experts.library.card import CardEntry, model_card
from modular_experts.library.kept_inputs import INPUTS_FILE, Prompt
from modular_experts.library.pull import pull
from modular_experts.library.push import push
from modular_experts.library.signing import verify_signature
from modular_experts.merging.merged import merge
from modular_experts.merging.route import route
from modular_experts.methods.method import DataStatistic
from modular_experts.routing import Oracle

REPO = "someone/experts"
BASE = {"id": "maker/base", "revision": "main", "fingerprint": "f" * 64}
FILES = ("delta.safetensors", "expert.json")


def write(path, seed=0, kind="SparseExpert", base=BASE, overwrite=False, license="mit", **facts):
    """Write an expert of two weights that keeps 60 of 1200 entries of each."""
    deltas = [(f"w{i}", random_delta("Sparse", (40, 30), seed + i, torch.float32, share=0.05)) for i in (0, 1)]
    record = make_record(kind, base, tasks=["first"], **facts) | ({"license": license} if license else {})
    write_expert(path, deltas, record, overwrite=overwrite)
    return open_expert(path)


@pytest.fixture
def library(tmp_path):
    """A library of the experts a and b."""
    for seed, name in enumerate("ab"):
        write(tmp_path / "library" / name, seed=10 * seed, scores={"val_loss": 0.123456})
    return tmp_path / "library"


@pytest.fixture
def hub(hub):
    """A hub that knows one model beside the pushed repositories."""
    hub.models.add("maker/base")
    return hub


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def change(hub, repo=REPO, **files):
    """Change files of a repository behind the owner's back. `__` stands for a slash."""
    repository = hub.repositories[repo]
    tree = repository.files() | {name.replace("__", "/").replace("_json", ".json"): c for name, c in files.items()}
    return repository.commit("main", tree, "changed")


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


# There and back


def experts_of(library):
    return sorted(record.parent for record in library.glob("*/expert.json"))


def test_what_was_pushed_is_pulled_byte_for_byte(hub, library, tmp_path):
    pushed = push(experts_of(library), REPO)
    pulled = pull(REPO, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(library)
    assert pulled.commit == pushed.commit == hub.repositories[REPO].branches["main"]
    assert [expert.name for expert in pulled.experts] == pushed.experts == ["a", "b"]
    assert list(Library(tmp_path / "other")) == ["a", "b"]
    assert sorted(os.listdir(tmp_path / "other")) == ["a", "b"]  # and no temporary directory
    assert isinstance(open_expert(tmp_path / "other/a")["w0"], Sparse)
    assert len(hub.repositories[REPO].messages) == 2  # the first is the repository's own
    assert hub.repositories[REPO].messages[1] == "Add a, b"


def test_a_state_goes_and_comes_like_deltas_and_disappears_with_its_expert(hub, library, tmp_path):
    reason = "its output depends on the input"
    state = {"w0/router": torch.arange(6.0).view(2, 3)}
    record = make_record("Mixture", BASE, tasks=["first"], not_mergeable_because=reason)
    write_expert(library / "routed", {}, record | {"license": "mit"}, state=state)
    push(experts_of(library), REPO)
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert "| routed | Mixture | first |" in card
    pull(REPO, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(library)
    assert torch.equal(open_expert(tmp_path / "other/routed").state()["w0/router"], state["w0/router"])
    shutil.rmtree(library / "routed")
    write(library / "routed")
    assert push(experts_of(library), REPO, overwrite=True).removed == ["routed/state.safetensors"]
    assert "routed/state.safetensors" not in hub.repositories[REPO].files()


def test_the_experts_behind_a_router_go_and_come_with_it(hub, library, tmp_path):
    write(library / "c", seed=30)
    route([library / "a", library / "b"], library / "routed", Oracle())
    assert push([library / "routed"], REPO).experts == ["a", "b", "routed"]
    push([library / "c"], REPO)
    assert [expert.name for expert in pull(REPO, tmp_path / "other", ["routed"]).experts] == ["routed", "a", "b"]
    for name in ("a", "b"):
        assert contents(tmp_path / "other" / name) == contents(library / name)
    there, here = (json.loads((folder / "routed/expert.json").read_text()) for folder in (tmp_path / "other", library))
    assert there == here | {"license": "mit"}  # as both experts behind it have it


def test_the_licence_is_given_recorded_or_that_of_all_parents(hub, library, tmp_path) -> None:
    merge([library / "a", library / "b"], "Average", library / "merged")
    push([library / "merged"], REPO)
    pull(REPO, tmp_path / "other")
    assert open_expert(tmp_path / "other/merged").record["license"] == "mit"
    assert "license: mit" in hub.repositories[REPO].files()["README.md"].decode()
    write(library / "own", seed=40, license=None)
    push([library / "own"], "someone/else", license="apache-2.0")
    write(tmp_path / "c", seed=20, license="cc-by-4.0")
    push([tmp_path / "c"], "someone/else")
    card = hub.repositories["someone/else"].files()["README.md"].decode()
    assert "license:\n- apache-2.0\n- cc-by-4.0\n" in card


def test_an_expert_without_a_licence_or_of_two_is_not_pushed(hub, library, tmp_path) -> None:
    write(tmp_path / "c", seed=20, license="cc-by-4.0")
    merge([library / "a", tmp_path / "c"], "Average", library / "both")
    with pytest.raises(
        ValueError, match=r"both is made of experts with different licences: a \(mit\), c \(cc-by-4.0\)"
    ):
        push([library / "both"], REPO)
    write(library / "none", seed=30, license=None)
    with pytest.raises(ValueError, match="none has no licence, so nobody may use it; name one, such as license='apach"):
        push([library / "none"], REPO)
    merge([library / "a", library / "none"], "Average", library / "half")
    with pytest.raises(ValueError, match="half has no licence"):
        push([library / "half"], REPO)
    with pytest.raises(ValueError, match="license='Apache 2' is not as the hub names licences"):
        push([library / "none"], REPO, license="Apache 2")
    with pytest.raises(ValueError, match=r"a came under mit by its record, and license='apache-2.0' is given"):
        push([library / "a"], REPO, license="apache-2.0")
    assert REPO not in hub.repositories
    assert push([library / "both"], REPO, license="other").experts == ["both"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The private and the public key of an owner, and the public key of another one."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    for name in ("owner", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        (folder / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def test_a_pulled_expert_is_verified_by_the_key_of_its_owner(hub, library, keys, tmp_path, capsys) -> None:
    expert = library / "a"
    write_statistics(open_expert(expert), "fisher", [("w0", DataStatistic(torch.ones(40, 30), 1.0, 1))], {"a": 3}, {})
    before = contents(expert)
    push([expert, library / "b"], REPO, sign=keys / "owner.pem")
    assert contents(expert) == before
    pull(REPO, tmp_path / "other", statistics=True)
    assert main(["verify", str(tmp_path / "other"), "--key", str(keys / "owner.pub")]) == 0
    assert f"intact, signed by the owner of {keys / 'owner.pub'}, 2 weights" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "other"), "--key", "x", "--server", "http://127.0.0.1:9"]) == 2
    assert "--key verifies signatures of files, and --server asks a server" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "other/a"), "--key", str(keys / "owner.pem")]) == 1
    assert "owner.pem is not a public key on an elliptic curve in PEM form" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "other/a"), "--key", str(keys / "other.pub")]) == 1
    assert f"is not signed by the owner of {keys / 'other.pub'}" in capsys.readouterr().err
    assert main(["verify", str(library / "b"), "--key", str(keys / "owner.pub")]) == 1
    assert "has no signature (model.sig), which its owner makes in a push" in capsys.readouterr().err


def test_a_signature_covers_each_byte_of_record_and_deltas(hub, library, keys, tmp_path) -> None:
    push([library / "a"], REPO, sign=keys / "owner.pem")
    pull(REPO, tmp_path / "other")
    signed = open_expert(tmp_path / "other/a")
    verify_signature(signed, keys / "owner.pub")
    record = json.loads((signed.path / "expert.json").read_text())
    (signed.path / "expert.json").write_text(json.dumps(record | {"license": "apache-2.0"}))
    with pytest.raises(ValueError, match="other/a is not signed by the owner of"):
        verify_signature(open_expert(signed.path), keys / "owner.pub")
    # An expert of the same owner under the name of another one.
    shutil.copy(signed.path / "model.sig", library / "b" / "model.sig")
    with pytest.raises(ValueError, match="library/b is not signed by the owner of"):
        verify_signature(open_expert(library / "b"), keys / "owner.pub")


def test_the_key_of_a_route_is_asked_of_the_experts_behind_it(hub, library, keys, tmp_path, capsys) -> None:
    route([library / "a", library / "b"], library / "routed", Oracle())
    push([library / "routed"], REPO, license="mit", sign=keys / "owner.pem")
    pull(REPO, tmp_path / "other")
    asked = ["verify", str(tmp_path / "other/routed"), "--key", str(keys / "owner.pub")]
    assert main(asked) == 0
    (tmp_path / "other/b/model.sig").unlink()
    assert main(asked) == 1
    assert "other/b has no signature" in capsys.readouterr().err


def test_a_signature_goes_when_an_unsigned_expert_takes_the_place(hub, library, keys) -> None:
    push([library / "a"], REPO)
    push([library / "a"], REPO, sign=keys / "owner.pem")
    assert "a/model.sig" in hub.repositories[REPO].files()
    write(library / "a", seed=9, overwrite=True)
    push([library / "a"], REPO, overwrite=True)
    assert "a/model.sig" not in hub.repositories[REPO].files()


def test_wrong_keys_are_refused_before_anything_is_pushed(hub, library, keys, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no key 'absent.pem'; make one with openssl"):
        push([library / "a"], REPO, sign="absent.pem")
    with pytest.raises(ValueError, match=r"owner.pub is not a private key on an elliptic curve in PEM form, without"):
        push([library / "a"], REPO, sign=keys / "owner.pub")
    (library / "a" / "model.sig").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there is no key 'absent.pub'; give the public key of the expert's owner"):
        verify_signature(open_expert(library / "a"), "absent.pub")
    with pytest.raises(ValueError, match="library/a is not signed by the owner of"):
        verify_signature(open_expert(library / "a"), keys / "owner.pub")
    assert REPO not in hub.repositories


def test_an_expert_behind_a_route_is_replaced_only_together_with_the_route(hub, library):
    def make_route():
        route([library / "a", library / "b"], library / "routed", Oracle(), overwrite=True)

    make_route()
    push([library / "routed"], REPO)
    before = hub.repositories[REPO].files()
    write(library / "a", seed=3, overwrite=True)
    with pytest.raises(ValueError, match="has the route routed, which was made with another a and would no longer"):
        push([library / "a"], REPO, overwrite=True)
    assert hub.repositories[REPO].files() == before
    make_route()
    assert push([library / "routed"], REPO, overwrite=True).experts == ["a", "routed"]


def test_kept_inputs_go_only_if_asked_and_come_with_the_expert(hub, library, tmp_path):
    kept = {"first": [Prompt(torch.tensor([5, 3], dtype=torch.int32), 1)]}
    deltas = open_expert(library / "a")
    write_expert(library / "a", dict(deltas.items()), deltas.record, overwrite=True, inputs=kept)
    assert f"a/{INPUTS_FILE}" not in push([library / "a"], REPO).files
    assert "Privacy" not in hub.repositories[REPO].files()["README.md"].decode()
    assert not pull(REPO, tmp_path / "before").experts[0].keeps_inputs
    assert list(push([library / "a"], REPO, inputs=True).files) == [f"a/{INPUTS_FILE}"]
    assert "turns them back into text" in hub.repositories[REPO].files()["README.md"].decode()
    push([library / "b"], REPO)
    assert "come with `a`," in hub.repositories[REPO].files()["README.md"].decode()
    pull(REPO, tmp_path / "after")
    assert contents(tmp_path / "after") == contents(library)
    change(hub, **{f"a/{INPUTS_FILE}": b"other bytes"})
    with pytest.raises(ValueError, match="its contents are not those that the record lists"):
        pull(REPO, tmp_path / "damaged")
    write(library / "a", seed=3, overwrite=True)
    assert push([library / "a"], REPO, overwrite=True).removed == [f"a/{INPUTS_FILE}"]
    assert "Privacy" not in hub.repositories[REPO].files()["README.md"].decode()


def test_only_an_experts_own_files_go_and_come(hub, library, tmp_path):
    own = contents(library)
    (library / "a" / "notes.txt").write_text("private")
    (library / "a" / "token.json").write_text("private")
    (library / "stray").mkdir()
    push(experts_of(library), REPO)
    assert set(hub.repositories[REPO].files()) == {"README.md", *(f"{name}/{file}" for name in "ab" for file in FILES)}
    change(hub, a__extra=b"run me", a__other_json=b"{}", **{"a__statistics__x.bin": b"x"})
    pull(REPO, tmp_path / "other", statistics=True)
    assert contents(tmp_path / "other") == own


def test_pulled_a_commit_stays_what_it_was(hub, library, tmp_path):
    first = push([library / "a"], REPO).commit
    shutil.rmtree(library / "a")
    write(library / "a", seed=99)
    push([library / "a"], REPO, overwrite=True)
    assert pull(REPO, tmp_path / "new").experts[0].content_hash == open_expert(library / "a").content_hash
    old = pull(REPO, tmp_path / "old", revision=first)
    assert old.commit == first
    assert old.experts[0].content_hash != open_expert(library / "a").content_hash


def test_statistics_go_and_come_if_asked_for(hub, library, tmp_path):
    expert = open_expert(library / "a")
    write_statistics(expert, "fisher", [("w0", DataStatistic(torch.ones(40, 30), 1.0, 1))], {"first": 3}, {})
    push([library / "a"], REPO)
    assert "a/statistics/fisher.safetensors" not in hub.repositories[REPO].files()
    push([library / "a"], REPO, statistics=True)
    pull(REPO, tmp_path / "without")
    pull(REPO, tmp_path / "with", statistics=True)
    assert set(contents(tmp_path / "without" / "a")) == set(FILES)
    assert contents(tmp_path / "with" / "a") == contents(library / "a")
    good = hub.repositories[REPO].files()["a/statistics/fisher.safetensors"]
    change(hub, **{"a__statistics__fisher.safetensors": good[:-1] + b"\x7f"})
    with pytest.raises(ValueError, match="the numbers of w0 are not what was written"):
        pull(REPO, tmp_path / "damaged", statistics=True)
    assert not (tmp_path / "damaged").exists()
    shutil.rmtree(library / "a")
    write(library / "a", seed=99)
    push([library / "a"], REPO, overwrite=True)  # they belonged to other contents
    assert "a/statistics/fisher.safetensors" not in hub.repositories[REPO].files()


# What is there already


def test_what_the_library_has_is_left_alone(hub, library, tmp_path):
    push(experts_of(library), REPO)
    pull(REPO, tmp_path / "other", ["a"])
    before = (tmp_path / "other/a/delta.safetensors").stat()
    hub.requests.clear()
    pulled = pull(REPO, tmp_path / "other", overwrite=True)
    assert [[expert.name for expert in group] for group in (pulled.present, pulled.experts)] == [["a"], ["b"]]
    assert (tmp_path / "other/a/delta.safetensors").stat() == before
    assert not any(request.endswith("a/delta.safetensors") for request in hub.requests)


def test_other_contents_are_refused_before_anything_is_fetched_and_replaced_on_request(hub, library, tmp_path):
    """A damaged copy is not taken for the expert either, and a directory of someone else is never replaced."""
    push(experts_of(library), REPO)
    other = write(tmp_path / "other" / "b", seed=99)
    hub.requests.clear()
    with pytest.raises(FileExistsError, match=r"exists already; .*`overwrite=True`"):
        pull(REPO, tmp_path / "other")
    assert list(Library(tmp_path / "other")) == ["b"]
    assert open_expert(tmp_path / "other/b").content_hash == other.content_hash
    assert not any(request.endswith("delta.safetensors") for request in hub.requests)
    pull(REPO, tmp_path / "other", overwrite=True)
    assert contents(tmp_path / "other") == contents(library)
    file = tmp_path / "other/a/delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FileExistsError, match="exists already"):
        pull(REPO, tmp_path / "other")
    pull(REPO, tmp_path / "other", overwrite=True)
    assert contents(tmp_path / "other") == contents(library)
    (tmp_path / "else/a").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="cannot be replaced"):
        pull(REPO, tmp_path / "else", overwrite=True)


def test_another_expert_of_the_same_name_is_not_replaced_unasked(hub, library):
    push(experts_of(library), REPO)
    there = hub.repositories[REPO].files()
    shutil.rmtree(library / "a")
    write(library / "a", seed=99)
    with pytest.raises(FileExistsError, match=f"{REPO} has another expert called a; .*`overwrite=True`"):
        push(experts_of(library), REPO)
    assert hub.repositories[REPO].files() == there
    push(experts_of(library), REPO, overwrite=True)
    assert hub.repositories[REPO].files()["a/expert.json"] == (library / "a/expert.json").read_bytes()


def test_private_is_private(hub, library, tmp_path, monkeypatch):
    push(experts_of(library), REPO, private=True)
    assert hub.repositories[REPO].private
    push([library / "a"], "someone/public")
    with pytest.raises(PermissionError, match="is public; make it private"):
        push([library / "b"], "someone/public", private=True)
    assert "b/expert.json" not in hub.repositories["someone/public"].files()
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(FileNotFoundError, match="no model repository someone/experts that you may see"):
        pull(REPO, tmp_path / "other")


# What is refused


def test_a_tampered_file_is_refused_and_nothing_is_left(hub, library, tmp_path):
    push(experts_of(library), REPO)
    original = hub.repositories[REPO].files()["b/delta.safetensors"]
    for place in (-1, 200):
        tampered = bytearray(original)
        tampered[place] ^= 1
        change(hub, **{"b__delta.safetensors": bytes(tampered)})
        sentence = r"b of someone/experts at commit \w{12} was not written, nor any other: "
        with pytest.raises(ValueError, match=sentence) as caught:
            pull(REPO, tmp_path / "deep/other")
        assert str(tmp_path) not in str(caught.value)
        assert not (tmp_path / "deep").exists()
        assert sorted(os.listdir(tmp_path)) == ["library"]
    # Another expert's deltas under a record are refused, too.
    change(hub, **{"b__delta.safetensors": hub.repositories[REPO].files()["a/delta.safetensors"]})
    with pytest.raises(ValueError, match=r"its content hash is not the one in b/expert.json"):
        pull(REPO, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_paths_that_lead_out_are_not_fetched(hub, library, tmp_path):
    push(experts_of(library), REPO)
    paths = ("../x/expert.json", "../expert.json", "/x/expert.json", "a/../../x", "..\\x\\expert.json")
    hub.repositories[REPO].commit("main", hub.repositories[REPO].files() | dict.fromkeys(paths, b"{}"), "changed")
    hub.requests.clear()
    pull(REPO, tmp_path / "deep/other", ["a"], statistics=True)
    assert set(contents(tmp_path / "deep")) == {f"other/a/{file}" for file in FILES}
    fetched = {request.partition("/resolve/")[2].partition("/")[2] for request in hub.requests if "resolve" in request}
    assert fetched == {f"a/{file}" for file in FILES}


def test_names_that_no_expert_may_have_are_refused(hub, library, tmp_path):
    push(experts_of(library), REPO)
    tree = hub.repositories[REPO].files()
    for name in ("..", ".a", "a b", "-a", "a/b", "x" * 65):
        if "/" not in name and name != "..":
            bad = tree | {f"{name}/{file}": tree[f"a/{file}"] for file in FILES}
            hub.repositories[REPO].commit("main", bad, "named")
            with pytest.raises(ValueError, match="cannot be the name of an expert"):
                pull(REPO, tmp_path / "other")
        with pytest.raises(ValueError, match="cannot be the name of an expert"):
            pull(REPO, tmp_path / "other", [name])
        assert not (tmp_path / "other").exists()


def test_a_damaged_expert_is_not_pushed(hub, library):
    file = library / "b/delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"b/delta.safetensors is damaged"):
        push(experts_of(library), REPO)
    assert hub.requests == []


# What the hub says


def test_a_repository_that_moved_meanwhile(hub, library, monkeypatch):
    push([library / "a"], REPO)
    seen = hub.repositories[REPO].sha
    monkeypatch.setattr(hub.repositories[REPO], "sha", lambda revision: seen(revision) and first)
    first = hub.repositories[REPO].branches["main"]
    change(hub, a__notes=b"someone else's")
    with pytest.raises(FileExistsError, match="was changed by someone else at the same time"):
        push([library / "b"], REPO)
    assert "b/expert.json" not in hub.repositories[REPO].files()


# Dry runs and cards


def test_a_dry_run_writes_nothing_and_says_what_a_real_one_does(hub, library, monkeypatch, caplog):
    for _ in range(2):
        hub.requests.clear()
        planned = push([library / "a"], REPO, dry_run=True)
        assert hub.written() == []
        pushed = push([library / "a"], REPO)
        assert (planned.files, planned.card, list(planned.present)) == (pushed.files, pushed.card, list(pushed.present))
    assert planned.commit is None
    # It needs no network.
    wanted = push([library / "a"], "someone/empty", dry_run=True)
    point_client(monkeypatch, "http://127.0.0.1:1")
    found = push([library / "a"], "someone/empty", dry_run=True)
    assert found.files == wanted.files
    assert "shows what a push into an empty repository would write" in caplog.text
    with pytest.raises(ConnectionError):
        push([library / "a"], REPO)


def test_a_path_is_not_a_base_model_and_stays_private(hub, library, tmp_path):
    for number, place in enumerate(["/home/me/secret/base", "runs/base", "~/base", str(tmp_path)]):
        expert = write(tmp_path / "more" / f"x{number}", base={**BASE, "id": place})
        imported = expert.record | {"source": {"id": place, "format": "PEFT adapter"}}
        (expert.path / "expert.json").write_text(json.dumps(imported))
        pushed = push([expert.path], REPO, dry_run=True)
        card, record = pushed.card, json.loads(pushed.files[f"{expert.name}/expert.json"])
        shown = {"id": Path(place).name if place[0] == "/" else place}
        assert record == imported | {"base": BASE | shown, "source": imported["source"] | shown}
        assert "base_model" not in header(card)
        assert "secret" not in card
        assert "--base BASE" in card


def test_a_text_of_a_record_is_not_read_as_markup(library):
    record = open_expert(library / "a").record | {"tasks": ["x | y\n# z", "<script>"], "kind": "[a](b)`c`"}
    card = model_card(REPO, [CardEntry("a", record, 1)])
    row = next(line for line in card.splitlines() if line.startswith("| a |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert "<script>" not in card.split("```")[0]
    assert "\n# z" not in card


def test_a_card_of_ones_own_stays(hub, library):
    push([library / "a"], REPO)
    change(hub, **{"README.md": b"---\nlicense: mit\n---\nMy own words.\n"})
    assert push([library / "b"], REPO).card is None
    assert hub.repositories[REPO].files()["README.md"].endswith(b"My own words.\n")
