"""What featurize and cache info say of the rows and of the labels."""

import shutil
from dataclasses import asdict

from conftest import write_pair
from mmcli.featurize import FeaturizeOptions, featurize

OPTIONS = FeaturizeOptions(dtype="float32")


def test_the_summary_counts_what_came_out(pairs, tmp_path, free):
    folder, labels = pairs(12)
    for guid in range(1, 13):
        (folder / f"{guid}.txt").write_text(f"text {guid}")
    (folder / "1.txt").write_bytes("你好 hello".encode("gbk"))
    (folder / "2.txt").write_bytes("grüß dich".encode("cp1252"))
    (folder / "3.txt").write_text("http://t.co/x @ann")
    (folder / "4.txt").write_text("")
    (folder / "5.txt").write_text("long " * 20)
    for suffix in ("jpg", "txt"):
        shutil.copy(folder / f"6.{suffix}", folder / f"7.{suffix}")
    shutil.copy(folder / "8.jpg", folder / "9.jpg")
    (folder / "11.txt").write_text("SAME words")
    (folder / "12.txt").write_text("same words")
    rows = ["1,a", "2,Nan", "3,null", "4,", "5,", "6,NaN", "7,b", "8,a", "9,a", "99,b"]
    labels.write_text("guid,tag\n" + "\n".join(rows) + "\n")
    found = featurize(folder, labels, tmp_path / "f.h5", OPTIONS)
    assert asdict(found.content) == {
        "codecs": {"utf-8": 10, "gbk": 1, "cp1252": 1},
        "empty_texts": 2,
        "truncated_texts": 1,
        "repeated_pairs": 1,
        "repeated_images": 2,
        "repeated_texts": 2,
    }
    counted = found.labels
    assert counted.classes == {"Nan": 1, "a": 3, "b": 1}
    assert (counted.labelled, counted.unlabelled) == (5, 7)
    assert counted.read_as_unlabelled == {"null": 1, "": 2, "NaN": 1}
    assert (counted.labels_without_pair, counted.label) == (1, "99")
    assert (counted.pairs_without_label, counted.pair) == (3, "10")


def test_what_a_cache_holds_is_counted_later_too_and_data_need_not_be_said_again(cli, pairs, tmp_path, tiny_clip):
    import json

    folder, labels = pairs(20)
    (folder / "1.txt").write_bytes("grüß dich".encode("cp1252"))
    code, out, _ = cli("featurize", folder, "--labels", labels, "--backbone", tiny_clip)
    assert code == 0
    assert "20 labelled" in out
    assert "utf-8 19, cp1252 1" in out
    (folder / "2.jpg").unlink()
    code, out, err = cli("featurize")
    assert code == 0, err
    assert "1 cached pairs cannot be read now; example: '2': image missing" in out
    with labels.open("a") as file:
        file.write("002,positive\n")
    write_pair(folder, 21)
    found = json.loads(cli("cache", "info", "--json")[1])
    assert found["content"]["codecs"] == {"utf-8": 19, "cp1252": 1}
    assert found["labels"]["classes"] == {"negative": 6, "neutral": 7, "positive": 7}
    assert (found["labels"]["label"], found["labels"]["pair"]) == ("002", "21")
    assert found["without_files"] == {"rows": 1, "example": "2"}
    shown = cli("cache", "info")[1]
    assert "1 labels without a pair, such as '002'; 1 pairs that the labels file does not name, such as '21'" in shown
    assert "1 rows whose files are not both there, such as '2'" in shown
    shutil.rmtree(folder)
    code, out, _ = cli("cache", "info")
    assert code == 0
    assert "no such folder or manifest" in out


def test_no_data_and_no_cache_is_a_usage_error(cli):
    code, _, err = cli("featurize")
    assert code == 2
    assert "give DATA" in err


def test_labels_given_once_are_kept_though_the_manifest_has_a_column_of_its_own(pairs, tmp_path, free):
    folder, labels = pairs(6)
    lines = [f"{guid},{folder}/{guid}.jpg,text {guid},up" for guid in range(1, 7)]
    manifest = tmp_path / "m.csv"
    manifest.write_text("guid,image,text,label\n" + "\n".join(lines) + "\n")
    out = tmp_path / "f.h5"
    featurize(manifest, labels, out, OPTIONS)
    found = featurize(manifest, None, out, OPTIONS).labels
    assert (found.file, found.classes) == (str(labels), {"negative": 2, "neutral": 2, "positive": 2})


def test_classes_that_differ_in_spelling_alone_are_named(pairs, tmp_path, free):
    folder, labels = pairs(6)
    labels.write_text("guid,tag\n1,Shoes\n2,shoes\n3,hats\n4,SHOES\n5,arm band\n6,arm-band\n")
    found = featurize(folder, labels, tmp_path / "f.h5", OPTIONS).labels
    assert found.alike_classes == [["SHOES", "Shoes", "shoes"], ["arm band", "arm-band"]]
