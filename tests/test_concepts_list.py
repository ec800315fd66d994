"""The list that names several subjects, as a file: what is read, and what is refused in a sentence."""

import json

import pytest

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.concepts_list import read_concepts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not valid JSON"),
        ("{}", "a list of 1 to 63 objects"),
        ("[]", "a list of 1 to 63 objects"),
        ("[3]", "entry 1 of .* is not an object"),
        ('[{"instance_prompt": "a"}]', "has no instance_data_dir"),
        ('[{"instance_data_dir": "a", "instance_prompt": " "}]', "has no instance_prompt"),
        ('[{"instance_data_dir": "a", "instance_prompt": "b", "steps": 3}]', "unknown key 'steps'"),
        ('[{"instance_data_dir": "a", "instance_prompt": 3}]', "instance_prompt must be a text"),
        ('[{"instance_data_dir": "a", "instance_prompt": "b", "weight": 0}]', "weight must be"),
        ('[{"instance_data_dir": "a", "instance_prompt": "b", "weight": "1"}]', "weight must be"),
        ('[{"instance_data_dir": "a", "instance_prompt": "b", "trigger": {"a": 1}}]', "trigger must be"),
    ],
)
def test_a_broken_list_is_refused_in_a_sentence(tmp_path, text, words):
    path = tmp_path / "concepts.json"
    path.write_text(text)
    with pytest.raises(EffiLoRAError, match=words):
        read_concepts(path)


def test_a_list_of_another_trainer_is_read(tmp_path):
    entry = {"instance_prompt": "a", "class_prompt": "b", "instance_data_dir": "c", "class_data_dir": "d"}
    path = tmp_path / "concepts.json"
    path.write_text("\ufeff" + json.dumps([entry]))
    (found,) = read_concepts(path)
    assert (found.instance_prompt, found.class_prompt) == ("a", "b")
    assert (found.instance_data_dir, found.class_data_dir, found.weight) == ("c", "d", 1.0)
