use super::*;

#[test]
fn a_place_is_read_from_what_it_is_displayed_as() {
    for root in 0..=255 {
        let root = DevFn(root);
        for behind in [None, Some(DevFn(0)), Some(DevFn(0xa7)), Some(DevFn(255))] {
            let place = Place { root, behind };
            assert_eq!(place.to_string().parse(), Ok(place));
        }
    }
    let place = Place {
        root: DevFn(0x10),
        behind: Some(DevFn(0xff)),
    };
    assert_eq!(place.to_string(), "02.0/1f.7");
}

#[test]
fn other_texts_are_no_places() {
    for text in [
        "",
        "/",
        "2.0",
        "02.8",
        "20.0",
        "02.0/",
        "/02.0",
        "02",
        "02.00",
        "+2.0",
        "0A.0",
        "02.0/00.1/00.1",
        "00:02.0",
        " 02.0",
    ] {
        assert_eq!(text.parse::<Place>(), Err(BadPlace), "{text:?}");
    }
}
