//! Pages on their way.

use super::*;
use crate::live::pages::{Arriving, Pending, Round, send};
use crate::wire::connection::Received;

const IN_LARGE: u64 = LARGE_PAGE / PAGE_SIZE;

/// Sends the pages of `written` from a guest to another, which is returned.
fn carry(layout: &RamLayout, written: impl Iterator<Item = u64>) -> Ram {
    let mut from = Ram::of(layout.clone());
    let to = Ram::of(layout.clone());
    for page in written {
        from.write(page, page + 1);
    }
    let (source, destination) = UnixStream::pair().unwrap();
    let connect = |end: UnixStream| Connection::new(end.into(), connection::Limits::default());
    let (mut source, mut destination) = (connect(source).unwrap(), connect(destination).unwrap());
    let all = PageSet::full(layout);
    let sent = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let pending = Pending::new(&from, &all, Round::First);
            let sent = send(&mut source, &pending, || Ok(()));
            drop(source);
            sent.unwrap()
        });
        let mut arriving = Arriving::new(layout);
        while let Ok(received) = destination.receive() {
            let Received::Pages(body) = received else {
                panic!("{received:?}");
            };
            arriving.data(&mut destination, &to, &body).unwrap();
        }
        assert_eq!(arriving.first_torn(), None);
        let sent = sending.join().unwrap();
        assert_eq!(sent.data, arriving.pages());
        sent
    });
    assert_eq!(to.bytes, from.bytes);
    assert_eq!(sent.zero + sent.data, layout.pages());
    to
}

fn layout() -> RamLayout {
    // The second range does not begin where a large page would if there were no gap.
    RamLayout::new([(0, 3 * LARGE_PAGE + PAGE_SIZE), (1 << 32, 2 * LARGE_PAGE)]).unwrap()
}

#[test]
fn what_is_mostly_filled_gets_large_pages() {
    let layout = layout();
    let second = 3 * IN_LARGE + 1;
    let to = carry(&layout, 0..layout.pages());
    let all = [0, 1, 2].map(|page| (0, page * LARGE_PAGE));
    let all = [all.as_slice(), &[(1, 0), (1, LARGE_PAGE)]].concat();
    assert_eq!(*to.enlarged.lock().unwrap(), all);

    // Whatever comes before it.
    let half = (IN_LARGE - 3..IN_LARGE + 5).chain(second + IN_LARGE + 200..layout.pages());
    let to = carry(&layout, half);
    assert_eq!(*to.enlarged.lock().unwrap(), [(1, LARGE_PAGE)]);
}

#[test]
fn what_is_touched_here_and_there_gets_none() {
    let layout = layout();
    let to = carry(&layout, (0..layout.pages()).filter(|page| page % 3 == 0));
    assert_eq!(*to.enlarged.lock().unwrap(), []);
}
