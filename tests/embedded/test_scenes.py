import torch
from torch.testing import assert_close

from asymlift.embedded.scenes import LABELS, all_labels, caption, make_scenes


def test_a_scene_depends_on_its_seed_and_index_alone():
    many = make_scenes(range(1500), seed=3)  # more than one chunk
    few = make_scenes([1400, 7], seed=3)
    other = make_scenes([7], seed=4)

    assert_close(few.image, many.image[[1400, 7]], rtol=0, atol=0)
    assert_close(few.labels, many.labels[[1400, 7]])
    assert not torch.equal(other.image[0], few.image[1])


def test_scenes_are_pictures_of_their_labels():
    scenes = make_scenes(range(400), seed=0, size=48)

    assert scenes.image.shape == (400, 3, 48, 48)
    assert scenes.image.min() >= 0 and scenes.image.max() <= 1
    counts = torch.tensor(list(LABELS.values()))
    assert (scenes.labels >= 0).all() and (scenes.labels < counts).all()
    assert all(scenes.labels[:, i].unique().numel() == n for i, n in enumerate(counts))


def test_colours_are_continuous():
    """A hard palette gives a VAE that no linear basis can align to."""
    image = (make_scenes(range(64), seed=0).image * 255).round()

    assert image.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).shape[0] > 5000


def test_every_caption_is_different_and_the_two_colours_differ():
    rows = all_labels()

    assert len({caption(row) for row in rows}) == len(rows) == 4 * 4 * 6 * 5 * 6
    assert (rows[:, 2] != rows[:, 3]).all()
    assert caption([0, 0, 0, 4, 0]) == "a red striped disc on blue with letter A"
