"""What is kept of a file's annotations, and what the report says of the rest."""

from annotation_files import annotation, content, load

from tailseg.data.annotations.annotations import summary


def test_filter_counts_what_it_drops(tmp_path):
    rows = [
        annotation(1),
        annotation(2, bbox=[50, 10, 20, 20]),  # begins where the image ends
        annotation(3, bbox=[-20, 10, 20, 20]),
        annotation(4, area=0),
        annotation(5, bbox=[10, 10, 0.5, 20]),
        annotation(6, bbox=[10, 10, 0, 20]),  # no width: it meets nothing
        annotation(7, iscrowd=1, segmentation={"size": [40, 50], "counts": [100, 50, 1850]}),
        annotation(8, bbox=[49, 39, 20, 20]),  # meets the last pixel
        annotation(9, bbox=[10, 10, 1, 1], category_id=4),
    ]
    data = load(tmp_path, content(rows))
    assert data.annotation_ids.tolist() == [1, 5, 7, 8, 9]
    assert data.trained.tolist() == [True, False, False, True, True]  # the thin one and the crowd are scored only
    report = data.report
    assert (report.annotations, report.crowd, report.outside, report.no_area, report.thin) == (9, 1, 3, 1, 1)
    assert report.dropped == 4
    assert report.empty_images == 1
    assert data.annotation_ids[data.rows(1)].tolist() == [1, 8, 9]
    assert data.rows(0).size == 0
    assert data.image_counts().tolist() == [1, 1, 0]
    assert [c.instance_count for c in data.categories] == [2, 1, 0]


def test_thin_object_with_a_faulty_mask_is_dropped_and_counted(tmp_path):
    data = load(tmp_path, content([annotation(1), annotation(2, bbox=[10, 10, 0.5, 20], segmentation=[[1, 1, 2, 2]])]))
    assert data.annotation_ids.tolist() == [1]
    assert (data.report.thin, data.report.thin_dropped, data.report.dropped) == (1, 1, 1)
    assert "dropped 1: 1 narrower or lower than a pixel with a faulty mask" in summary(data)


def test_area_that_the_file_does_not_state_is_the_masks(tmp_path):
    whole = {"size": [40, 50], "counts": [0, 2000]}
    square = [[10, 10, 20, 10, 20, 20, 10, 20]]
    rows = [
        annotation(1, area=None, segmentation=square),
        annotation(2, area=None, segmentation=whole),
        annotation(3, segmentation=square),
    ]
    for row in rows[:2]:
        del row["area"]
    data = load(tmp_path, content(rows))
    assert data.areas.tolist() == [100, 2000, annotation(3)["area"]]
