import csv
import io
import json
import re
import shutil
import unicodedata

import pytest
from conftest import write_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.cache import DataError, read_ids, read_labels
from mmcli.cache.labels import parse_columns
from mmcli.featurize import Dataset
from mmcli.featurize.pairs.pair import natural_key


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text", ["guid,tag\n8,\n26,neutral\n9,null\n", "\ufeffguid,tag\r\n8,\r\n26,neutral\r\n9,null\r\n"]
)
def test_labels_are_read_in_order_and_null_is_unlabelled(tmp_path, text):
    found = read_labels(write(tmp_path / "labels.csv", text))
    assert list(found.items()) == [("8", None), ("26", "neutral"), ("9", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,label\n1,a\n", "expected the header guid,tag, found name,label"),
        ("guid,tag,more\n1,a,b\n", "expected the header guid,tag"),
        ("", "empty"),
        ("guid,tag\n1,a\n2,b\n1,c\n", "guid '1' occurs twice, in lines 2 and 4"),
        ("guid,tag\n1,a,b\n", "line 2: 3 cells"),
        ("guid,tag\n,a\n", "line 2: the guid is empty"),
        ("guid,tag\n", "has a header, but no labels"),
        ("guid;id;tag\n1;1;a\n", "the columns 'guid' and 'id' can both be the guid"),
        ('guid,tag\n1,a\n2,"b\n3,a\n', "unexpected end of data"),
    ],
)
def test_malformed_labels(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_labels(write(tmp_path / "labels.csv", text))


def test_labels_that_are_not_there_or_not_utf8(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "gbk.csv").write_bytes("guid,tag\n1,\u597d\n".encode("gbk"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_labels(tmp_path / "gbk.csv")


def test_ids_keep_their_order_and_are_checked(tmp_path):
    assert read_ids(write(tmp_path / "a.csv", "guid,tag\n9,null\n8,null\n")) == ["9", "8"]
    assert read_ids(write(tmp_path / "b.csv", "guid\n9\n8\n")) == ["9", "8"]
    for text, words in (("guid\n9\n9\n", "occurs twice"), ("tag\na\n", "column guid"), ("guid\n", "lists no guid")):
        with pytest.raises(DataError, match=words):
            read_ids(write(tmp_path / "c.csv", text))


def test_a_folder_is_listed_in_natural_order(tmp_path):
    for guid in (26, 8, 100, "b-2", "b-10"):
        write_pair(tmp_path / "data", guid)
    (tmp_path / "data" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "data" / "notes.md").write_text("not a pair")
    found = Dataset.open(tmp_path / "data")
    assert [pair.guid for pair in found.pairs] == ["8", "26", "100", "b-2", "b-10"]


@given(st.lists(st.text()))
def test_natural_order_is_total(guids):
    backwards = guids[::-1]
    assert sorted(guids, key=natural_key) == sorted(backwards, key=natural_key)


def test_what_is_wrong_with_a_pair_is_known(tmp_path, pairs):
    folder, _ = pairs(3)
    (folder / "2.png").write_bytes((folder / "2.jpg").read_bytes())
    (folder / "3.txt").unlink()
    labels = write(tmp_path / "labels.csv", "guid,tag\n1,a\n77,b\n")
    found = {pair.guid: pair for pair in Dataset.open(folder, labels).pairs}
    assert found["1"].problem is None
    assert "given twice: 2.jpg, 2.png" in found["2"].problem
    with pytest.raises(DataError, match="text missing"):
        found["3"].read_text()
    assert "neither image nor text" in found["77"].problem


def test_the_labels_file_inside_the_folder_is_no_pair(pairs):
    folder, labels = pairs(3)
    inside = folder / "train.txt"
    labels.rename(inside)
    assert [pair.guid for pair in Dataset.open(folder, inside).pairs] == ["1", "2", "3"]


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="no such folder or manifest"):
        Dataset.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pairs in"):
        Dataset.open(tmp_path / "empty")


ROWS = [
    {"guid": "1", "image": "pictures/1.jpg", "text": "so good, \u597d", "label": "up"},
    {"guid": "2", "image": "pictures/2.jpg", "text": "bad\nline", "label": ""},
    {"guid": "1", "image": "pictures/1.jpg", "text": "again", "label": "down"},
    {"guid": "3", "image": "pictures/3.jpg", "text": "fine", "label": "down"},
]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_manifest(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "csv":
        quoted = [",".join(f'"{value}"' for value in row.values()) for row in ROWS]
        write(path, "guid,image,text,label\n" + "\n".join(quoted) + "\n")
    elif suffix == "jsonl":
        write(path, "\n".join(json.dumps(row) for row in ROWS))
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path)
    found = Dataset.open(path)
    by_guid = {pair.guid: pair for pair in found.pairs}
    assert by_guid["2"].image == str(tmp_path / "pictures" / "2.jpg")
    assert by_guid["2"].read_text() == b"bad\nline"
    assert "given twice, again in line" in by_guid["1"].problem
    assert found.labels == {"1": None, "2": None, "3": "down"}
    assert found.labels_path == path


def test_jsonl_keys_may_come_late(tmp_path):
    first = {"guid": "1", "image": "1.jpg", "text": "a"}
    lines = [json.dumps(first), json.dumps(first | {"guid": "2", "label": "up"})]
    assert Dataset.open(write(tmp_path / "p.jsonl", "\n".join(lines))).labels == {"1": None, "2": "up"}


def test_names_and_texts_that_are_not_clean_unicode(tmp_path, pairs):
    folder, _ = pairs(2)
    (folder / b"caf\xe9.jpg".decode(errors="surrogateescape")).write_bytes(b"x")
    found = Dataset.open(folder).pairs
    assert [pair.problem for pair in found] == [None, None, "the file's name is not UTF-8"]
    assert found[2].guid == r"caf\xe9"
    assert all(pair.guid.encode() for pair in found)
    line = '{"guid": "1", "image": "a\\u0000.jpg", "text": "half \\ud83d"}'
    (pair,) = Dataset.open(write(tmp_path / "p.jsonl", line)).pairs
    assert pair.read_text() == b"half ?"
    with pytest.raises(DataError, match="cannot be read"):
        pair.read_image()


def test_labels_of_other_pairs(tmp_path, pairs):
    folder, _ = pairs(2)
    with pytest.raises(DataError, match=r"none of the 1 guids in .* give the labels of these pairs"):
        Dataset.open(folder, write(tmp_path / "labels.csv", "guid,tag\n99,a\n"))


def test_a_manifest_with_text_files_and_one_without_the_columns(tmp_path):
    write(tmp_path / "t.txt", "from a file")
    path = write(tmp_path / "pairs.csv", "guid,image,text_path\n1,1.jpg,t.txt\n")
    assert Dataset.open(path).pairs[0].read_text() == b"from a file"
    with pytest.raises(DataError, match="a manifest needs columns for guid, image, and text"):
        Dataset.open(write(tmp_path / "other.csv", "guid,picture\n1,1.jpg\n"))
    with pytest.raises(DataError, match="line 2 is not JSON"):
        Dataset.open(write(tmp_path / "bad.jsonl", '{"guid": "1", "image": "1.jpg", "text": ""}\n{'))


@settings(max_examples=300)
@given(st.lists(st.text(alphabet="ab019 -_é", max_size=8), max_size=12))
def test_natural_order_is_that_of_texts_and_numbers_in_turn(guids):
    def plain(guid):
        parts = re.split(r"([0-9]+)", guid)
        return [int(part) if index % 2 else part for index, part in enumerate(parts)], guid

    assert sorted(guids, key=natural_key) == sorted(guids, key=plain)


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize("image_name", [nfd("café"), "café"])
@pytest.mark.parametrize("text_name", [nfd("café"), "café"])
def test_names_that_look_the_same_are_the_same_guid(tmp_path, image_name, text_name):
    write_pair(tmp_path / "made", "1")
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "made" / "1.jpg", tmp_path / "data" / f"{image_name}.jpg")
    shutil.copy(tmp_path / "made" / "1.txt", tmp_path / "data" / f"{text_name}.txt")
    for spelled in (nfd("café"), "café"):
        found = Dataset.open(tmp_path / "data", write(tmp_path / "labels.csv", f"guid,tag\n{spelled},a\n"))
        (pair,) = found.pairs
        assert (pair.guid, pair.problem, found.labels) == ("café", None, {"café": "a"})
        assert pair.read_image() == (tmp_path / "made" / "1.jpg").read_bytes()
        assert pair.read_text() == (tmp_path / "made" / "1.txt").read_bytes()
        assert read_ids(write(tmp_path / "ids.csv", f"guid\n{spelled}\n")) == ["café"]


def test_two_files_whose_names_look_the_same_are_not_one_pair(tmp_path):
    write_pair(tmp_path / "data", "café")
    shutil.copy(tmp_path / "data" / "café.jpg", tmp_path / "data" / f"{nfd('café')}.jpg")
    (pair,) = Dataset.open(tmp_path / "data").pairs
    assert "guid given twice" in pair.problem


def test_a_picture_is_known_by_what_it_is_and_not_by_its_suffix(tmp_path, pairs):
    folder, _ = pairs(4)
    (folder / "1.jpg").rename(folder / "1.jpg_large")
    (folder / "2.jpg").rename(folder / "2")
    (folder / "3.jpg").rename(folder / "3.JFIF")
    (folder / "4.jpg").unlink()
    (folder / "4.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "5.txt").write_text("alone")
    (folder / "6.json").write_text("{}")
    found = {pair.guid: pair for pair in Dataset.open(folder).pairs}
    assert list(found) == ["1", "2", "3", "4", "5"]
    assert all(found[guid].problem is None and found[guid].read_image() for guid in "123")
    assert found["4"].problem == "4.heic is not a readable image"
    with pytest.raises(DataError, match="image missing"):
        found["5"].read_image()


@pytest.mark.parametrize(
    ("name", "label", "differ_in"),
    [
        ("{:03d}", "{}", "leading zeros"),
        ("{}", "{:04d}", "leading zeros"),
        ("{}", "{}.jpg", "a file suffix"),
        ("IMG_{}", "img_{}", "capitals"),
        ("{}", "images/{}", "a folder"),
        ("{}", "{}.0", "a fraction .0"),
        ("a {}", "a_{}", "spaces, hyphens and underscores"),
        ("IMG-{:03d}", "data/img_{}.JPG", "spelling"),
    ],
)
def test_guids_that_almost_match_are_named(tmp_path, pairs, name, label, differ_in):
    folder, _ = pairs(20)
    for guid in range(1, 21):
        for suffix in ("jpg", "txt"):
            (folder / f"{guid}.{suffix}").rename(folder / f"x{guid}.{suffix}")
    for guid in range(1, 21):
        for suffix in ("jpg", "txt"):
            (folder / f"x{guid}.{suffix}").rename(folder / f"{name.format(guid)}.{suffix}")
    write_pair(folder, "exact")
    rows = "".join(f"{label.format(guid)},a\n" for guid in range(1, 21))
    found = Dataset.open(folder, write(tmp_path / "labels.csv", f"guid,tag\nexact,b\n{rows}")).join
    assert found.alike == found.labels_without_pair == found.pairs_without_label
    assert found.differ_in == differ_in
    example = f"for example, the label names {found.label!r} and the pair is called {found.pair!r}"
    assert f"differ only in {differ_in}: {example}" in found.describe()
    with pytest.raises(DataError, match=f"give the labels of these pairs.* differ only in {differ_in}"):
        Dataset.open(folder, write(tmp_path / "labels.csv", f"guid,tag\n{rows.replace('exact', '')}"))


def test_labels_that_pandas_wrote_as_fractions_are_whole_numbers(tmp_path):
    assert read_labels(write(tmp_path / "a.csv", "guid,tag\n1,0.0\n2,1.0\n3,\n")) == {"1": "0", "2": "1", "3": None}
    assert read_labels(write(tmp_path / "b.csv", "guid,tag\n1,0.0\n2,0.5\n")) == {"1": "0.0", "2": "0.5"}
    lines = [
        json.dumps({"guid": guid, "image": "x", "text": "t", "label": label}) for guid, label in ((1, 1.0), (2, None))
    ]
    assert read_labels(write(tmp_path / "c.jsonl", "\n".join(lines))) == {"1": "1", "2": None}


def test_what_is_read_as_unlabelled_is_counted_by_its_spelling(tmp_path):
    rows = "1,\n2,null\n3,NaN\n4,Nan\n5,None\n6,NA\n7,null\n"
    found = read_labels(write(tmp_path / "labels.csv", f"guid,tag\n{rows}"))
    assert [guid for guid, label in found.items() if label is None] == ["1", "2", "3", "7"]
    assert found.unlabelled == {"": 1, "null": 2, "NaN": 1}


TABLE_ROWS = [("a", "1.jpg", 'semi;colon, "quoted"', "up"), ("b", "sub/2.jpg", "tab\tand line\nbreak", "家电")]


def rows_as(name, header, rows):
    """Return a table of these rows as text, by the suffix of its name."""
    if name.lower().endswith(("jsonl", "ndjson")):
        return "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows)
    if name.lower().endswith("json"):
        return json.dumps([dict(zip(header, row, strict=True)) for row in rows], ensure_ascii=False)
    buffer = io.StringIO()
    delimiter = ";" if "semicolon" in name else "\t" if name.endswith("tsv") else ","
    csv.writer(buffer, delimiter=delimiter).writerows([header, *rows])
    return buffer.getvalue()


@pytest.mark.parametrize("header", ["guid,image,text,label", "id,img,caption,tag", "ID,File_Name,Title,Class"])
@pytest.mark.parametrize("name", ["m.csv", "semicolon.csv", "m.tsv", "m.jsonl", "m.NDJSON", "m.json"])
def test_a_table_of_any_form_with_the_usual_names_is_a_manifest(tmp_path, name, header):
    path = write(tmp_path / name, rows_as(name, header.split(","), TABLE_ROWS))
    found = Dataset.open(path)
    assert found.unused_columns == []
    assert found.labels == {"a": "up", "b": "家电"}
    for pair, (guid, image, text, _) in zip(found.pairs, TABLE_ROWS, strict=True):
        assert (pair.guid, pair.image, pair.text) == (guid, str(tmp_path / image), text)
    assert read_ids(path) == ["a", "b"]


def test_labels_and_ids_in_tables_of_other_forms(tmp_path):
    for name, text in (
        ("a.tsv", "id\tcategory\n1\tx\n"),
        ("b.csv", "guid;class\n1;x\n"),
        ("c.json", '[{"id": 1, "tag": "x"}]'),
    ):
        path = write(tmp_path / name, text)
        assert read_labels(path) == {"1": "x"}
        assert read_ids(path) == ["1"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "guid,image,text,title\n1,1.jpg,a,b\n", "the columns 'text' and 'title' can both be the text"),
        (
            "m.csv",
            "id,img,file_name,text\n1,1.jpg,1.jpg,a\n",
            "the columns 'img' and 'file_name' can both be the image",
        ),
        ("m.json", '{"id": 1}', r"expected a list of objects, .* call it .jsonl"),
        ("m.json", "[1]", "expected an object"),
        ("m.json", "[", "is not JSON"),
        ("m.csv", "name,picture\n1,1.jpg\n", "name them, as in --columns guid=id,image=picture"),
    ],
)
def test_a_table_that_is_not_understood_is_one_line(tmp_path, name, text, words):
    with pytest.raises(DataError, match=words):
        Dataset.open(write(tmp_path / name, text))


def test_backslashes_in_paths_of_a_manifest_are_slashes(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "t.txt", "words")
    (tmp_path / "odd\\name.txt").write_text("odd")
    path = write(tmp_path / "m.csv", "guid,image,text_path\n1,sub\\1.jpg,sub\\t.txt\n2,sub/2.jpg,odd\\name.txt\n")
    first, second = Dataset.open(path).pairs
    assert (first.image, first.read_text()) == (str(tmp_path / "sub" / "1.jpg"), b"words")
    assert second.read_text() == b"odd"


@pytest.mark.parametrize("column", ["label", "tag"])
def test_labels_of_a_manifest_may_be_called_label_or_tag(tmp_path, column):
    path = write(tmp_path / "m.csv", f"guid,image,text,{column},price\n1,1.jpg,t,up,3\n")
    found = Dataset.open(path)
    assert (found.labels, found.unused_columns) == ({"1": "up"}, ["price"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "guid,image,text,label,tag\n1,1.jpg,t,a,b\n", "the columns 'label' and 'tag' can both be the label"),
        ("m.csv", "guid,image,text,text\n1,1.jpg,t,u\n", "the column 'text' 2 times"),
        ("m.jsonl", '{"guid": "1", "image": "1.jpg", "text": "t", "label": ["a", "b"]}', "line 1: label is a list"),
        ("m.jsonl", '{"guid": {"id": 1}, "image": "1.jpg", "text": "t"}', "line 1: guid is an object"),
        ("m.jsonl", '{"guid": "a\\ud800", "image": "1.jpg", "text": "t"}', "line 1: guid holds half a character"),
        (
            "m.jsonl",
            '{"guid": "1", "image": "1.jpg", "text": "t", "label": "\\udc00"}',
            "label holds half a character",
        ),
        ("m.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("m.JSONL", '{"guid": 1, "image": "1.jpg", "text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_odd_content_of_a_manifest_is_one_line(tmp_path, name, text, words):
    with pytest.raises(DataError, match=words):
        Dataset.open(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": float("nan")}, "text missing"),
        ({"text": None}, "text missing"),
        ({"image": float("nan")}, "image missing"),
        ({"text": ["a", "b"]}, "text is a list or an object, not one value"),
        ({"image": "https://example.com/x.png"}, "the path is a URL: download the file first"),
        ({"guid": "a\nb"}, "the guid holds a control character"),
        ({"guid": "a\0"}, "the guid holds a control character"),
        ({"guid": "é" * 600}, "the guid is longer than 1000 bytes"),
    ],
)
def test_odd_values_of_a_manifest_are_rejects_and_not_words(tmp_path, row, problem):
    from mmcli.featurize.pairs.hashing import unreadable

    write_pair(tmp_path, "1")
    path = write(tmp_path / "m.jsonl", json.dumps({"guid": "1", "image": "1.jpg", "text": "t"} | row))
    (pair,) = Dataset.open(path).pairs
    assert unreadable(pair).reason == problem


def test_a_path_that_cannot_be_encoded_is_a_reject(tmp_path):
    from mmcli.featurize.pairs.hashing import unreadable

    row = {"guid": "1", "image": "a\ud800.jpg", "text": "t"}
    (pair,) = Dataset.open(write(tmp_path / "m.jsonl", json.dumps(row))).pairs
    found = unreadable(pair)
    assert found.reason.startswith("image cannot be read: 'utf-8' codec can't encode character '\\ud800'")
    assert found.path == str(tmp_path / "a\\ud800.jpg")


def test_what_is_no_file_is_not_read(tmp_path):
    import os

    from mmcli.featurize.pairs.hashing import unreadable

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "/dev/zero"):
        path = write(tmp_path / "m.jsonl", json.dumps({"guid": "1", "image": name, "text": "t"}))
        (pair,) = Dataset.open(path).pairs
        assert unreadable(pair).reason in ("image is not a file", "image cannot be read: Is a directory")


def test_the_order_of_a_manifest_is_kept(tmp_path):
    path = write(tmp_path / "m.csv", "guid,image,text\n" + "".join(f"{guid},1.jpg,t\n" for guid in (9, 10, 2)))
    assert Dataset.open(path).order == ["9", "10", "2"]


def test_images_in_a_subfolder_are_pointed_at(tmp_path):
    write_pair(tmp_path / "data" / "images", "1")
    with pytest.raises(DataError, match="there are images in images/: give that folder, or a manifest"):
        Dataset.open(tmp_path / "data")


def test_columns_can_be_chosen_and_texts_joined(tmp_path):
    (tmp_path / "img" / "b").mkdir(parents=True)
    path = write(
        tmp_path / "train.csv",
        "id,picture,title,description,category,price\n7,b/1.jpg,Red shoes,,Shoes,3\n9,b/2.jpg,,very soft,Toys,4\n",
    )
    columns = parse_columns("image=picture, text=title+description,label=category")
    found = Dataset.open(path, columns=columns, image_root=tmp_path / "img")
    assert [(pair.guid, pair.image, pair.text) for pair in found.pairs] == [
        ("7", str(tmp_path / "img" / "b" / "1.jpg"), "Red shoes"),
        ("9", str(tmp_path / "img" / "b" / "2.jpg"), "very soft"),
    ]
    assert (found.labels, found.unused_columns) == ({"7": "Shoes", "9": "Toys"}, ["price"])
    assert found.used_columns["text"] == "title+description"
    again = Dataset.recorded(found.to_header(), labels=True)
    assert (list(again.pairs), again.labels) == (list(found.pairs), found.labels)
    assert read_labels(path, columns) == found.labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text=title+words", "has no column 'words' for the text: it has id, img, title, note, label"),
        ("guid=key", "has no column 'key' for the guid"),
        ("label=kind", "has no column 'kind' for the label"),
    ],
)
def test_a_chosen_column_that_is_not_there_is_named(tmp_path, text, words):
    path = write(tmp_path / "m.csv", "id,img,title,note,label\n1,1.jpg,a,b,x\n")
    with pytest.raises(DataError, match=re.escape(words)):
        Dataset.open(path, columns=parse_columns(text))


@pytest.mark.parametrize("text", ["text", "colour=red", "text=", "guid=id,,"])
def test_columns_that_are_no_columns(text):
    with pytest.raises(DataError, match=r"--columns cannot have .* write name=column, with a name among guid, image"):
        parse_columns(text)


def test_labels_in_a_table_of_their_own_need_no_chosen_columns(tmp_path):
    path = write(tmp_path / "m.csv", "sku,img,text,kind\n7,1.jpg,a,x\n9,2.jpg,b,y\n")
    labels = write(tmp_path / "labels.csv", "guid,tag\n7,up\n9,down\n")
    columns = parse_columns("guid=sku,label=kind")
    assert Dataset.open(path, columns=columns).labels == {"7": "x", "9": "y"}
    found = Dataset.open(path, labels, columns)
    assert (found.labels, found.unused_columns) == ({"7": "up", "9": "down"}, ["kind"])
    assert read_labels(labels, columns) == {"7": "up", "9": "down"}
