"""A small task from scikit-learn's iris table: which lm-eval needs, so that it is there."""

import csv
import importlib.util
import json
import textwrap
from pathlib import Path

SPECIES = ("setosa", "versicolor", "virginica")
SIZE = 6


def _documents() -> list[dict[str, object]]:
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    table = Path(spec.origin).parent / "datasets" / "data" / "iris.csv"
    with table.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [
        {
            "question": f"An iris of sepal length {row[0]} cm, sepal width {row[1]} cm, petal "
            f"length {row[2]} cm and petal width {row[3]} cm is an iris",
            "species": list(SPECIES),
            "answer": int(row[4]),
            "name": SPECIES[int(row[4])],
        }
        for row in rows[:: len(rows) // SIZE][:SIZE]
    ]


def write_tasks(folder: Path) -> Path:
    """Writes three tasks: iris_choice, iris_text, iris_words."""
    data = folder / "iris.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in _documents()), encoding="utf-8")
    head = textwrap.dedent(
        f"""
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {data}}}}}
        test_split: test
        """
    )
    choice = """
        task: iris_choice
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_target: answer
        doc_to_choice: "{{species}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """
    text = """
        task: iris_text
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{name}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
        metric_list: [{metric: exact_match}]
        """
    words = """
        task: iris_words
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}} {{name}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
        """
    for name, body in (("choice", choice), ("text", text), ("words", words)):
        (folder / f"iris_{name}.yaml").write_text(head + textwrap.dedent(body), encoding="utf-8")
    return folder
