"""Published tables with their own columns, over real audio files as people unpack them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.cli_data import PublishedTable
from ask_dist.data.pack_rows import PackSettings
from ask_dist.data.packing import pack_table
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.sources import Source
from ask_dist.data.table import Row
from ask_dist.data.tables import READERS
from ask_dist.errors import InputError

RATE = 8000


def record(folder: Path, *names: str) -> Path:
    """A folder with a second of noise in each of the files."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, RATE)
        soundfile.write(folder / name, noise, RATE)
    return folder


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def seen(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Audio and captions of the rows that are not refused."""
    return [(row.audio, row.captions) for row in rows if not row.refused]


def test_every_reader_can_be_asked_for():
    assert [recipe.value for recipe in PublishedTable] == sorted(READERS)


def test_audiocaps_joins_the_captions_of_a_cut_and_finds_its_file_under_any_usual_name(tmp_path):
    audio = record(tmp_path / "audio", "r1nicOVtvkQ_130.wav", "deep/YUDGBjjwyaqE.flac", "91141.wav", "fourth.wav")
    table = write(
        tmp_path / "train.csv",
        "audiocap_id,youtube_id,start_time,caption\n"
        "91139,r1nicOVtvkQ,130,A woman talks nearby as water pours\n"
        "58146,UDGBjjwyaqE,20,Multiple clanging and clanking sounds\n"
        '91140,r1nicOVtvkQ,130,"Water pours, then a woman talks"\n'
        "91141,abcdefghijk,0,Wind\n"
        "91142,missing,30,Rain\n",
    )
    rows = READERS["audiocaps"](table, audio)
    assert seen(rows) == [
        ("r1nicOVtvkQ_130.wav", ["A woman talks nearby as water pours", "Water pours, then a woman talks"]),
        ("deep/YUDGBjjwyaqE.flac", ["Multiple clanging and clanking sounds"]),
        ("91141.wav", ["Wind"]),
    ]
    assert rows[0].extra == {
        "youtube_id": "r1nicOVtvkQ",
        "start_time": "130",
        "recording": "youtube:r1nicOVtvkQ",
    }
    assert (rows[3].line, rows[3].refused) == (
        6,
        "no audio file is called missing_30 or Ymissing_30 or missing or Ymissing or 91142",
    )


def test_two_files_of_one_name_are_told_and_not_guessed_between(tmp_path):
    audio = record(tmp_path / "audio", "cuts/aaaaaaaaaaa_30.wav", "old/aaaaaaaaaaa_30.flac", "old/bbbbbbbbbbb_0.wav")
    header = "audiocap_id,youtube_id,start_time,caption\n"
    table = write(tmp_path / "test.csv", f"{header}1,aaaaaaaaaaa,30,a\n2,bbbbbbbbbbb,0,b\n")
    first, second = READERS["audiocaps"](table, audio)
    files = "cuts/aaaaaaaaaaa_30.wav and old/aaaaaaaaaaa_30.flac"
    assert first.refused == f"several audio files are called aaaaaaaaaaa_30, such as {files}"
    assert (second.audio, second.refused) == ("old/bbbbbbbbbbb_0.wav", "")


def test_audiosetcaps_ids_have_a_y_in_audioset_alone(tmp_path):
    audio = record(tmp_path / "audio", "---1_cCGK4M.wav", "YAbCdEfGhIjK.flac", "OxPnZzn1_L8_000883.wav")
    table = write(
        tmp_path / "AudioSetCaps_caption.csv",
        'id,caption\nY---1_cCGK4M,"A choir sings, slowly."\nYAbCdEfGhIjK,A dog.\nOxPnZzn1_L8_000883,A horn.\nYgone,x\n',
    )
    assert seen(READERS["audiosetcaps"](table, audio)) == [
        ("---1_cCGK4M.wav", ["A choir sings, slowly."]),
        ("YAbCdEfGhIjK.flac", ["A dog."]),
        ("OxPnZzn1_L8_000883.wav", ["A horn."]),
    ]
    test = write(tmp_path / "test.csv", "audiocap_id,youtube_id,start_time,caption\n1,AbCdEfGhIjK,30,A dog barks\n")
    assert [row.refused for row in READERS["audiosetcaps"](table, audio, [test])][:3] == ["", "in test.csv", ""]
    test.write_text("youtube_id\n---1_cCGK4M\nOxPnZzn1_L8\n")
    assert [bool(row.refused) for row in READERS["audiosetcaps"](table, audio, [test])][:3] == [True, False, True]


def test_clotho_has_five_captions_a_clip_and_metadata_in_latin_1(tmp_path):
    audio = record(tmp_path / "audio", "development/Distorted AM Radio noise.wav", "development/ São Paulo.wav")
    header = "file_name," + ",".join(f"caption_{number}" for number in range(1, 6))
    lines = [f"Distorted AM Radio noise.wav,{','.join(f'radio {n}' for n in range(5))}", " São Paulo.wav,a,b,a,d,e"]
    table = write(tmp_path / "clotho_captions_development.csv", "\n".join([header, *lines]))
    metadata = write(
        tmp_path / "clotho_metadata_development.csv",
        "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
        'Distorted AM Radio noise.wav,noise;rádio,53943,https://freesound.org/people/x,"[0, 5]",José,cc\n',
        encoding="latin-1",
    )
    rows = READERS["clotho"](table, audio, [metadata])
    assert seen(rows) == [
        ("development/Distorted AM Radio noise.wav", [f"radio {number}" for number in range(5)]),
        ("development/ São Paulo.wav", ["a", "b", "d", "e"]),
    ]
    assert rows[0].extra == {"keywords": ["noise", "rádio"], "sound_id": "53943", "recording": "freesound:53943"}
    assert rows[1].extra == {}
    assert [row.captions for row in READERS["clotho"](table, audio)] == [row.captions for row in rows]


def test_esc50_says_its_class_in_a_sentence(tmp_path):
    audio = record(tmp_path / "audio", "1-100032-A-0.wav", "5-9032-A-49.wav")
    table = write(
        tmp_path / "esc50.csv",
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n5-9032-A-49.wav,5,49,hand_saw,False,9032,A\n",
    )
    dog, saw = READERS["esc50"](table, audio)
    assert (dog.audio, dog.captions, dog.classes) == ("1-100032-A-0.wav", ["this is the sound of dog"], ["dog"])
    assert (saw.captions, saw.classes) == (["this is the sound of hand saw"], ["hand saw"])
    assert saw.extra == {"fold": "5", "recording": "freesound:9032"}


def test_a_recording_has_one_name_in_all_corpora(tmp_path):
    audio = record(tmp_path / "audio", "x.wav")
    tables = {
        "audiocaps": write(tmp_path / "a.csv", "audiocap_id,youtube_id,start_time,caption\n1,Y-b_De3GhIj,30,a\n"),
        "audiosetcaps": write(tmp_path / "b.csv", "id,caption\nYY-b_De3GhIj,a\nY-b_De3GhIj_000883,a\nshort,a\n"),
        "clotho": write(tmp_path / "c.csv", "file_name,caption_1\nx.wav,a\ny.wav,a\n"),
        "esc50": write(tmp_path / "d.csv", "filename,fold,category\n1-2078-B-0.wav,1,dog\nodd.wav,1,dog\n"),
    }
    beside = {"clotho": [write(tmp_path / "e.csv", "file_name,keywords,sound_id\nx.wav,a,2078\ny.wav,a,Not found\n")]}
    found = {
        recipe: [row.extra.get("recording") for row in READERS[recipe](table, audio, beside.get(recipe, []))]
        for recipe, table in tables.items()
    }
    for name, clip in (("as", "YY-b_De3GhIj.wav"), ("fsd", "2078"), ("bbc", "2078"), ("sb", "2078")):
        table = wavcaps(tmp_path / f"{name}_final.json", clip)
        found[name] = [row.extra.get("recording") for row in READERS["wavcaps"](table, audio)]
    assert found == {
        "audiocaps": ["youtube:Y-b_De3GhIj"],
        "audiosetcaps": ["youtube:Y-b_De3GhIj", "youtube:Y-b_De3GhIj", None],
        "clotho": ["freesound:2078", None],
        "esc50": ["freesound:2078", None],
        "as": ["youtube:Y-b_De3GhIj"],
        "fsd": ["freesound:2078"],
        "bbc": [None],
        "sb": [None],
    }


def wavcaps(path: Path, *ids: str) -> Path:
    data = [{"id": name, "caption": f"Sound {name}.", "duration": 1.0, "description": "raw"} for name in ids]
    return write(path, json.dumps({"num_captions_per_audio": 1, "data": data}))


def test_wavcaps_drops_what_the_blacklists_have_of_its_own_source(tmp_path):
    audio = record(tmp_path / "audio", *(f"mnt/FreeSound_flac/{name}.flac" for name in (201, 376, 999)))
    record(tmp_path / "audio", "YtdWhHV3X25Q.flac", "Yother.flac")
    lists = [
        write(tmp_path / "blacklist_a.json", json.dumps({"AudioSet": ["YtdWhHV3X25Q.wav"], "FreeSound": ["201"]})),
        write(tmp_path / "blacklist_b.json", json.dumps({"AudioSet": [], "FreeSound": ["376"]})),
    ]
    freesound = wavcaps(tmp_path / "fsd_final.json", "201", "376", "999")
    audioset = wavcaps(tmp_path / "as_final.json", "YtdWhHV3X25Q.wav", "Yother.wav")
    soundbible = wavcaps(tmp_path / "sb_final.json", "201", "999")
    read = READERS["wavcaps"]
    assert seen(read(freesound, audio, lists)) == [("mnt/FreeSound_flac/999.flac", ["Sound 999."])]
    assert [row.refused for row in read(freesound, audio, lists)] == ["in blacklist_a.json", "in blacklist_b.json", ""]
    assert seen(read(audioset, audio, lists)) == [("Yother.flac", ["Sound Yother.wav."])]
    assert len(seen(read(soundbible, audio, lists))) == 2  # its 201 is not Freesound's
    assert len(seen(read(freesound, audio))) == 3
    with pytest.raises(InputError, match="its source is told by its published name"):
        read(freesound.rename(tmp_path / "mine.json"), audio, lists)


def test_wavcaps_ids_are_the_same_with_wav_and_without(tmp_path):
    audio = record(tmp_path / "audio", "201.flac", "Yaaaaaaaaaaa.flac")
    banned = [write(tmp_path / "b.json", json.dumps({"AudioSet": ["Yaaaaaaaaaaa"], "FreeSound": ["201.wav"]}))]
    for table in (wavcaps(tmp_path / "fsd_final.json", "201"), wavcaps(tmp_path / "as_final.json", "Yaaaaaaaaaaa.wav")):
        assert [row.refused for row in READERS["wavcaps"](table, audio, banned)] == ["in b.json"]


@pytest.mark.parametrize("names", [{"Freesound": ["201"]}, {"AudioSet": ["Yaaaaaaaaaaa.wav"]}, {}])
def test_a_wavcaps_blacklist_without_the_source_is_refused(tmp_path, names):
    audio = record(tmp_path / "audio", "201.flac")
    banned = write(tmp_path / "b.json", json.dumps(names))
    table = wavcaps(tmp_path / "fsd_final.json", "201")
    with pytest.raises(
        InputError, match=r"b\.json has no list of FreeSound's ids, only .*: give one of WavCaps' black"
    ):
        READERS["wavcaps"](table, audio, [banned])


@pytest.mark.parametrize(
    ("recipe", "name", "text", "message"),
    [
        ("audiocaps", "t.csv", "youtube_id,caption\nx,y\n", "no column audiocap_id, start_time among"),
        ("audiosetcaps", "t.csv", "id,captions\nx,y\n", "no column caption among id, captions"),
        ("clotho", "t.csv", "file_name,caption\nx,y\n", "no column caption_1"),
        ("esc50", "t.csv", "filename,category\nx,y\n", "no column fold"),
        ("wavcaps", "sb_final.json", "version https://git-lfs.github.com/spec/v1", "is not JSON"),
        ("wavcaps", "sb_final.json", "[" * 100_000, "is not JSON"),
        ("wavcaps", "sb_final.json", '{"data": []}', "no list of clips"),
        ("wavcaps", "sb_final.json", '{"data": [{"id": "1"}]}', "clip 1 has no id and caption"),
        ("wavcaps", "missing/sb_final.json", None, "No such file"),
    ],
)
def test_what_was_not_published_like_this_is_named(tmp_path, recipe, name, text, message):
    audio = record(tmp_path / "audio", "x.wav")
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(InputError, match=message):
        READERS[recipe](tmp_path / name, audio)


def test_an_audio_folder_without_audio_is_named(tmp_path):
    table = write(tmp_path / "t.csv", "id,caption\nx,y\n")
    with pytest.raises(InputError, match="no audio file"):
        READERS["audiosetcaps"](table, tmp_path)
    with pytest.raises(InputError, match="no audio folder"):
        READERS["audiosetcaps"](table, tmp_path / "nowhere")


@pytest.mark.multiprocess
def test_a_published_table_becomes_shards_with_what_was_refused_named(tmp_path):
    audio = record(tmp_path / "audio", "201.flac", "999.flac")
    banned = write(tmp_path / "blacklist.json", json.dumps({"FreeSound": ["201"]}))
    table = wavcaps(tmp_path / "fsd_final.json", "201", "999", "1000")
    rows = READERS["wavcaps"](table, audio, [banned])
    summary = pack_table(rows, Source(audio), tmp_path / "out", PackSettings(sample_rate=RATE), processes=1)
    assert [(record["line"], record["reason"]) for record in summary.skipped] == [
        (1, "in blacklist.json"),
        (3, "no audio file is called 1000"),
    ]
    assert [row.name for row in rows] == ["freesound-201", "freesound-999", "freesound-1000"]
    (raw,) = read_shard(tmp_path / "out" / "train-000000.tar", 0, 1)
    assert raw.key == "freesound-999"
    told = {"id": "999", "recording": "freesound:999"}
    assert open_clip(raw, RATE)[1] == told | {"captions": ["Sound 999."], "classes": []}
