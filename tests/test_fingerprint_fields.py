"""Every field of the fingerprint that stage 2 compares: message, exit code, and what --allow-mismatch does."""

from __future__ import annotations

import json

import pytest
from small_experiment import rewrite_store

import cli

OTHER = "0" * 64


@pytest.mark.parametrize("field", ["tokenizer", "template", "image_preprocessing", "capture"])
def test_a_field_that_differs_is_3_and_may_be_allowed(field, experiment, tmp_path, capsys):
    store = rewrite_store(experiment.store, tmp_path / "store", fingerprint={field: OTHER})
    command = ["distill", "--config", str(experiment.file), f"cache.path={store}", f"output_dir={tmp_path}/out",
               "evaluate=null"]  # fmt: skip
    others = {"template"} - {field} or {"capture"}
    for allowed in ([], [f"--allow-mismatch={other}" for other in others]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *allowed])
        complaint = capsys.readouterr().err
        assert (
            stopped.value.code == 3
            and f"than what was asked (stored -> mine): {field}: {OTHER} -> " in complaint
        )
        assert "where a field cannot matter, --allow-mismatch FIELD lets it differ" in complaint
        assert not (tmp_path / "out").exists()

    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--allow-mismatch", field])
    told = capsys.readouterr().err
    assert stopped.value.code == 0, told
    assert f"cache.allow_mismatch (stored -> mine): {field}: {OTHER} -> " in told
    made = json.loads((tmp_path / "out" / "align_kd" / "provenance.json").read_text())
    (difference,) = made["allowed_mismatches"]
    assert (difference["field"], difference["stored"]) == (field, OTHER)
    assert made["config"]["cache"]["allow_mismatch"] == [field]


def test_a_field_that_there_is_not_is_answered_with_those_there_are(experiment, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill", "--config", str(experiment.file), "--allow-mismatch", "teacher"])
    assert stopped.value.code == 2
    assert "cache.allow_mismatch.0: Input should be 'tokenizer', 'template'" in capsys.readouterr().err
