from tailseg.data.diagnosis.class_names import near_names


def test_near_names():
    names = [
        "hot_dog",
        "Hot Dog",
        "hot-dogs",
        "berry",
        "berries",
        "cat",
        "car",
        "toaster",
        "coaster",
        "recieve",
        "receive",
    ]
    assert near_names(names) == [
        ("hot_dog", "Hot Dog", "spelling"),
        ("hot_dog", "hot-dogs", "plural"),
        ("Hot Dog", "hot-dogs", "plural"),
        ("berry", "berries", "plural"),
        ("toaster", "coaster", "one letter"),
        ("recieve", "receive", "one letter"),
    ]
    assert near_names([]) == []


def test_lvis_has_no_two_spellings_of_one_class(shared):
    lines = (shared / "data" / "lvis_v1_categories.csv").read_text().splitlines()[1:]
    near = near_names([line.split(",")[1] for line in lines])
    assert all(kind != "spelling" for _, _, kind in near)
    assert len(near) < 40
