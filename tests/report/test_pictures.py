import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieve_or_generate.image_set import (
    CANDIDATES,
    ImageSet,
    ImageSetWriter,
    load_image_set,
    read_table,
    seal_image_set,
)
from retrieve_or_generate.pixels import decode, encode_png
from retrieve_or_generate.report import pictures
from retrieve_or_generate.report.pictures import Strip

Sets = Callable[..., ImageSet]
COLOURS = {"kept": 250, "clip_score": 120, "nsfw": 60, "contaminated": 20}


def pixels_of(strip: Strip) -> np.ndarray:
    kind, _, data = strip.uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return decode(base64.b64decode(data))


@pytest.fixture
def sets(tmp_path: Path, make_set: Callable[..., None]) -> Sets:
    def made(source: str, per_class: int = 10, **options: object) -> ImageSet:
        folder = tmp_path / f"{source}{options.get('strength', '')}"
        make_set(folder, "textures", source, per_class, **options)
        return load_image_set(folder)

    return made


def grey_set(folder: Path, source: str, size: int = 32, classes: int = 2, strength: float = float("nan")) -> ImageSet:
    """A set whose pictures are as bright as `COLOURS` says for what became of them; one of each a class."""
    names = [f"class {label}" for label in range(classes)]
    with ImageSetWriter(folder, task="grey", source=source, key="k", class_names=names, config={}) as writer:
        for label in range(classes):
            for what, brightness in COLOURS.items():
                picture = encode_png(np.full((size, size, 3), brightness, np.uint8))
                key, init = f"{what}-{label}", {"init_key": f"{what}-{label}"} if strength == strength else {}
                writer.add(key=key, label=label, caption="", origin=init, query="", image=picture, strength=strength)
        writer.finish()
    rows = read_table(folder / CANDIDATES).to_pandas()
    what = rows["key"].str.split("-").str[0]
    rows["status"] = np.where(what == "kept", "kept", "dropped")
    rows["reason"] = what.where(what != "kept", "")
    rows["rank"] = np.where(what == "kept", 0, -1)
    table = read_table(folder / CANDIDATES)
    seal_image_set(folder, table.from_pandas(rows, schema=table.schema, preserve_index=False))
    return load_image_set(folder)


def test_sources_stand_beside_each_other_class_by_class(sets: Sets) -> None:
    gallery = pictures.gallery([sets("synthetic"), sets("perturbed", strength=0.4), sets("retrieved")])
    assert gallery is not None
    assert gallery.labels == ("retrieved", "synthetic", "perturbed 0.4")
    assert [row.class_name for row in gallery.rows][:3] == ["striped", "dotted", "chequered"]
    assert all(len(row.strips) == 3 for row in gallery.rows)
    strip = gallery.rows[0].strips[0][0]
    assert (strip.width, strip.height) == (4 * 32 + 3 * 2, 32)
    assert strip.words == "striped, retrieved"


def test_the_first_images_by_rank_are_shown(sets: Sets) -> None:
    retrieved = sets("retrieved")
    gallery = pictures.gallery([retrieved])
    assert gallery is not None
    first = decode(retrieved.images([retrieved.kept["key"].iloc[0]])[0])
    shown = pixels_of(gallery.rows[0].strips[0][0])[:, :32]
    assert np.abs(shown.astype(int) - first).mean() < 6


def test_dropped_images_are_not_in_the_gallery(tmp_path: Path) -> None:
    gallery = pictures.gallery([grey_set(tmp_path / "a", "retrieved")])
    assert gallery is not None
    for row in gallery.rows:
        [[strip]] = row.strips
        tiles = pixels_of(strip)
        assert tiles[:, :32].mean() == pytest.approx(COLOURS["kept"], abs=2)
        assert (tiles[:, 34:] > 250).all()  # blank: nothing else was kept


def test_large_images_become_small_thumbnails(tmp_path: Path) -> None:
    gallery = pictures.gallery([grey_set(tmp_path / "a", "retrieved", size=300)])
    assert gallery is not None
    assert gallery.rows[0].strips[0][0].height == 96


def test_of_many_classes_the_first_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    gallery = pictures.gallery([grey_set(tmp_path / "a", "retrieved", classes=20)])
    assert gallery is not None
    assert len(gallery.rows) == pictures.CLASSES
    assert gallery.classes == 20


def test_no_sets_no_gallery_no_strip() -> None:
    assert pictures.gallery([]) is None
    assert pictures.strength_strip([]) is None


def test_strength_grows_downwards_from_the_retrieved_image(sets: Sets) -> None:
    made = [sets("perturbed", strength=strength) for strength in (0.8, 0.2)]
    retrieved = sets("retrieved")
    strip = pictures.strength_strip([*made, retrieved])
    assert strip is not None
    assert [label for label, _ in strip.rows] == ["retrieved", "0.2", "0.8"]
    assert strip.class_names == retrieved.class_names
    original, little, much = (pixels_of(picture).astype(int) for _, picture in strip.rows)
    assert np.abs(little - original).mean() < np.abs(much - original).mean()


def test_the_strip_shows_no_image_that_was_dropped_for_its_content(tmp_path: Path) -> None:
    """Of the four pictures a class, only the kept one and the one of low CLIP score may be shown; the kept one ranks first."""
    strip = pictures.strength_strip(
        [grey_set(tmp_path / "a", "retrieved"), grey_set(tmp_path / "b", "perturbed", strength=0.4)]
    )
    assert strip is not None
    for _, picture in strip.rows:
        tiles = pixels_of(picture)
        assert tiles[:, :32].mean() == pytest.approx(COLOURS["kept"], abs=2)


def test_without_images_made_from_others_there_is_no_strip(sets: Sets) -> None:
    assert pictures.strength_strip([sets("retrieved"), sets("synthetic")]) is None
    assert pictures.strength_strip([sets("perturbed", strength=0.4)]) is None


def test_thumbnails_carry_no_metadata(sets: Sets) -> None:
    gallery = pictures.gallery([sets("retrieved", 2)])
    assert gallery is not None
    data = base64.b64decode(gallery.rows[0].strips[0][0].uri.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert not image.getexif()
        assert "icc_profile" not in image.info
