"""Pictures for models that draw: reading, cutting, shapes, and batches as a function of the step."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments import metrics
from experiments.data.cifar10 import read_cifar10
from experiments.data.files import DataError
from experiments.data.pictures import Pictures, Sides, groups, read_pictures, shapes_of
from experiments.sheet import draw
from experiments.tasks.latents import Drawn, Rows
from experiments.tasks.task import Sheet


def gradient(high: int, wide: int) -> np.ndarray:
    """Rows in red, columns in green."""
    rows, columns = np.meshgrid(np.arange(high), np.arange(wide), indexing="ij")
    return np.stack([4 * rows, 4 * columns, np.full_like(rows, 9)], -1).astype(np.uint8)


def saved(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_a_folder_is_read_with_the_captions_beside_its_images(tmp_path):
    for name in ("b.png", "a.PNG", "deep/c.png"):
        saved(tmp_path / name, gradient(8, 8))
    (tmp_path / "b.txt").write_text(" a red thing \n")
    (tmp_path / "notes.txt").write_text("no caption")
    found = read_pictures(tmp_path, "a sks thing")
    assert [path.name for path in found.sources] == ["a.PNG", "b.png", "c.png"]
    assert found.texts == ["a sks thing", "a red thing", "a sks thing"] and found.captioned == 1


def test_pixels_are_those_of_the_image_and_a_flip_is_a_mirror():
    pixels = gradient(10, 12)
    found = Pictures("x", [pixels], ["a"]).view(0, Sides(10, 12), crops=0, flips=True, seed=0)
    np.testing.assert_array_equal(found.pixels, [pixels, pixels[:, ::-1]])
    np.testing.assert_array_equal(found.sizes, [(10, 12, 0, 0, 10, 12)] * 2)


def test_parts_are_cut_where_the_sizes_say_and_the_seed_says_where():
    pictures = Pictures("x", [gradient(10, 20)] * 2, ["a"] * 2)
    look = lambda number, seed: pictures.view(number, Sides(10, 10), crops=3, flips=True, seed=seed)
    one = look(0, 0)
    for pixels, size, flipped in zip(one.pixels, one.sizes, [False, True] * 3, strict=True):
        height, width, top, left, *sides = map(int, size)
        assert (height, width, top, *sides) == (10, 20, 0, 10, 10)
        row = pixels[0, :, 1] // 4  # columns of the image
        expected = np.arange(10) + left if not flipped else 19 - left - np.arange(10)
        np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(one.pixels, look(0, 0).pixels)
    assert not np.array_equal(one.sizes, look(0, 1).sizes) and not np.array_equal(one.sizes, look(1, 0).sizes)
    assert len({tuple(size) for size in one.sizes}) > 2


def test_the_centre_is_cut_out_of_what_covers_the_sides():
    found = Pictures("x", [gradient(20, 40)], ["a"]).view(0, Sides(10, 10), crops=0, flips=False, seed=0)
    assert tuple(found.sizes[0]) == (20, 40, 0, 5, 10, 10)  # 10 x 20, 5 columns lost at each side
    small = np.asarray(Image.fromarray(gradient(20, 40)).resize((20, 10), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found.pixels[0], small[:, 5:15])


def test_a_camera_that_lay_on_its_side_is_turned_up_and_what_is_transparent_is_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    saved(tmp_path / "a.png", gradient(8, 12), exif=exif)
    clear = np.zeros((8, 8, 4), np.uint8)
    saved(tmp_path / "b.png", clear)
    found = read_pictures(tmp_path, "x")
    assert found.sides == [(12, 8), (8, 8)]
    view = lambda number, sides: found.view(number, sides, crops=0, flips=False, seed=0).pixels[0]
    np.testing.assert_array_equal(view(0, Sides(12, 8)), np.rot90(gradient(8, 12), -1))
    assert (view(1, Sides(8, 8)) == 255).all()


def test_each_picture_goes_to_the_nearest_shape():
    shapes = shapes_of(Sides(64, 64), 8)
    assert all(s.height * s.width <= 64 * 64 and s.height % 8 == s.width % 8 == 0 for s in shapes)
    assert Sides(64, 64) in shapes and max(s.height / s.width for s in shapes) <= 2
    arrays = [np.zeros((*sides, 3), np.uint8) for sides in ((40, 40), (50, 99), (99, 50), (41, 40), (20, 90))]
    found = groups(Pictures("x", arrays, ["a"] * 5), Sides(64, 64), buckets=True, multiple=8)
    assert found == [((48, 80), [1, 4]), ((64, 64), [0, 3]), ((80, 48), [2])]
    assert groups(Pictures("x", arrays, ["a"] * 5), Sides(64, 64), buckets=False, multiple=8) == [
        ((64, 64), [*range(5)])
    ]


def test_errors_say_what_is_wrong(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    saved(tmp_path / "small" / "a.png", gradient(10, 12))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no image")
    saved(tmp_path / "blank" / "a.png", gradient(8, 8))
    (tmp_path / "blank" / "a.txt").write_text(" \n")

    def said(call):
        with pytest.raises(DataError) as error:
            call()
        return str(error.value)

    assert said(lambda: read_pictures(empty)) == f"'{empty}' has no images (.jpg, .jpeg, .png, .webp, .bmp)"
    assert said(lambda: read_pictures(tmp_path / "broken", "x")).startswith(
        f"'{tmp_path / 'broken' / 'a.jpg'}' is no image that can be read: cannot identify image file"
    )
    place = tmp_path / "blank" / "a.txt"
    assert said(lambda: read_pictures(tmp_path / "blank")) == f"'{place}': empty caption: remove the line or fill it"
    place = tmp_path / "small" / "a.png"
    assert said(lambda: read_pictures(tmp_path / "small")) == (
        f"'{place}' has no text: give all images one, task.prompt='a photo of a sks dog', or each its own in a file "
        "beside it, 'a.txt'"
    )
    view = lambda: read_pictures(tmp_path / "small", "x").view(0, Sides(64, 64), crops=0, flips=False, seed=0)
    assert said(view) == (
        f"'{place}' has 12 x 10 pixels, too few for 64 x 64: it would be enlarged 6.4 times, at most 2 are taken"
    )
    whole = saved(tmp_path / "cut" / "a.jpg", gradient(64, 64)).read_bytes()
    (tmp_path / "cut" / "a.jpg").write_bytes(whole[: 2 * len(whole) // 3])
    cut = read_pictures(tmp_path / "cut", "x")
    assert "is no image that can be read: " in said(lambda: cut.view(0, Sides(64, 64), crops=0, flips=False, seed=0))


def test_cifar_is_read_from_its_files_and_from_folders(tmp_path):
    files = []
    for number in range(6):
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    ends = np.cumsum([0, *map(len, files)])
    arrays = {"labels": np.asarray([0, 1] * 3, np.uint8), "classes": np.asarray(["cat", "dog"]), "offsets": ends}
    np.savez(tmp_path / "cifar10_train_6_jpeg.npz", blob=np.frombuffer(b"".join(files), np.uint8), **arrays)
    found = read_cifar10(tmp_path, "train")
    values = [round(found.view(i, Sides(32, 32), crops=0, flips=False, seed=0).pixels.mean() / 40) for i in range(6)]
    assert sorted(values) == [*range(6)] and found.texts == [("a cat", "a dog")[value % 2] for value in values]
    saved(tmp_path / "test" / "frog" / "a.png", gradient(32, 32))
    assert read_cifar10(tmp_path, "test").texts == ["a frog"]
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="has neither a folder 'train' nor a file cifar10_train"):
        read_cifar10(tmp_path / "other", "train")


# -- batches -----------------------------------------------------------------------------------------------------------


def rows(count: int, side: int, views: int = 1) -> Rows:
    """Pictures whose pixels say their number and view."""
    numbers = np.arange(count)[:, None] * 10 + np.arange(views)
    mean = np.broadcast_to(numbers[:, :, None, None, None], (count, views, side, side, 1)).astype(np.float32)
    return Rows(mean, None, np.zeros((count, views, 6), np.float32), np.arange(count) + 1)


def drawn(parts, batch=2, seed=0, empty=0.0):
    return Drawn(parts, lambda numbers: {"tokens": (np.asarray(numbers),)}, batch, seed, empty)


def test_each_picture_is_seen_once_in_an_epoch_in_another_order_each_time():
    batches = drawn([rows(5, 2, views=3)], batch=2)
    seen = np.concatenate([batches(step)["mean"][:, 0, 0, 0] for step in range(10)])
    epochs = [tuple(part) for part in (seen // 10).reshape(4, 5)]
    assert all(sorted(epoch) == [*range(5)] for epoch in epochs) and len(set(epochs)) > 1
    assert set(seen % 10) == {0, 1, 2}
    np.testing.assert_array_equal(batches(7)["mean"], drawn([rows(5, 2, views=3)])(7)["mean"])
    assert not np.array_equal(
        np.stack([drawn([rows(5, 2)], seed=1)(i)["mean"] for i in range(5)]),
        np.stack([drawn([rows(5, 2)])(i)["mean"] for i in range(5)]),
    )


def test_texts_are_those_of_the_pictures_and_some_are_left_out():
    batches = drawn([rows(50, 1)], batch=50, empty=0.3)
    found = [batches(step) for step in range(20)]
    texts = np.concatenate([batch["texts"]["tokens"][0] for batch in found])
    numbers = np.concatenate([batch["mean"][:, 0, 0, 0] for batch in found]) / 10 + 1
    assert ((texts == 0) | (texts == numbers)).all() and 0.25 < np.mean(texts == 0) < 0.35


def test_shapes_take_turns_and_none_of_their_pictures_is_left_out():
    batches = drawn([rows(3, 2), rows(5, 4)], batch=2)
    found = [batches(step)["mean"] for step in range(10)]  # 2 and 3 batches a round
    sides = [batch.shape[1] for batch in found]
    assert sides.count(2) == 4 and sides.count(4) == 6
    for side, count in ((2, 3), (4, 5)):
        seen = np.concatenate([batch[:, 0, 0, 0] // 10 for batch in found if batch.shape[1] == side])
        assert sorted(seen[:count]) == [*range(count)]


# -- scores and sheets -------------------------------------------------------------------------------------------------


def test_scores_of_pictures():
    one, other = np.asarray([1.0, 0.0]), np.asarray([0.0, 2.0])
    assert metrics.likeness(np.stack([one, other]), np.stack([one])) == 0.5
    assert metrics.agreement(np.stack([one, other]), np.stack([3 * one, one])) == 0.5
    assert metrics.diversity(np.stack([[one, other, one]])) == pytest.approx(2 / 3)
    images = np.zeros((2, 2, 3, 3, 1))
    images[0, 1] = 0.5
    assert metrics.spread(images) == pytest.approx(0.25)


def test_a_sheet_shows_each_picture_enlarged(tmp_path):
    images = np.random.default_rng(0).random((2, 3, 8, 8, 1))
    draw(tmp_path / "sheet.png", {"before": Sheet(("a", "b"), images), "after": Sheet(("a", "b"), 1 - images)})
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    wanted = np.round(255 * images[1, 2, :, :, 0]).astype(np.uint8)
    top, left = 8 + 8 + 14 + 66, 8 + 120 + 2 * 66
    np.testing.assert_array_equal(pixels[top : top + 64 : 8, left : left + 64 : 8, 0], wanted)
    with pytest.raises(ValueError, match="other prompts"):
        draw(tmp_path / "sheet.png", {"a": Sheet(("a",), images[:1]), "b": Sheet(("a", "b"), images)})
