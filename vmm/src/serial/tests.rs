use proptest::prelude::*;

use super::*;

fn port() -> Arc<SerialPort> {
    wired().0
}

/// A port, and its interrupt line.
fn wired() -> (Arc<SerialPort>, EventFd) {
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let other = line.try_clone().unwrap();
    (SerialPort::new(other, None).unwrap(), line)
}

fn read(port: &SerialPort, offset: u64) -> u8 {
    let mut byte = [0];
    port.read(offset, &mut byte);
    byte[0]
}

#[test]
fn input_waits_for_a_driver() {
    let port = port();
    assert_eq!(port.offer(b"abc"), 0);
    let _ = port.write(1, &[IER_RECEIVE]);
    assert!(port.hungry().read().is_ok());
    assert_eq!(port.offer(b"abc"), 3);
    assert_eq!([(); 3].map(|()| read(&port, 0)), *b"abc");
    assert!(port.hungry().read().is_ok());
}

#[test]
fn no_input_is_lost_when_the_fifo_is_full() {
    let port = port();
    let _ = port.write(1, &[IER_RECEIVE]);
    let input: Vec<u8> = (0..200).collect();
    let (mut given, mut got) = (0, Vec::new());
    while got.len() < input.len() {
        given += port.offer(&input[given..]);
        while read(&port, 5) & 1 != 0 {
            got.push(read(&port, 0));
        }
    }
    assert_eq!(got, input);
}

#[test]
fn odd_accesses_are_answered() {
    let port = port();
    for len in [0, 2, 4, 8] {
        let mut data = vec![0; len];
        port.read(0, &mut data);
        assert!(data.iter().all(|b| *b == 0xff));
        let _ = port.write(7, &data);
    }
}

#[test]
fn a_paused_port_takes_nothing_and_says_when_it_does_again() {
    let (port, line) = wired();
    let _ = port.write(1, &[IER_RECEIVE]);
    let _ = port.hungry().read();
    port.pause();
    assert_eq!(port.offer(b"abc"), 0);
    assert!(line.read().is_err());
    port.resume();
    assert!(line.read().is_err(), "nothing is owed");
    assert!(port.hungry().read().is_ok());
    assert_eq!(port.offer(b"abc"), 3);
    assert_eq!(line.read().unwrap(), 1);
}

#[test]
fn a_restored_port_raises_what_it_owes_when_it_is_resumed() {
    let (port, _) = wired();
    let _ = port.write(1, &[IER_RECEIVE]);
    assert_eq!(port.offer(b"ab"), 2);
    port.pause();
    let (other, line) = wired();
    other.restore(&port.save()).unwrap();
    assert_eq!(other.offer(b"c"), 0);
    assert!(line.read().is_err(), "before the interrupt controllers");
    other.resume();
    assert_eq!(line.read().unwrap(), 1);
    assert_eq!(read(&other, 2) & 0xf, 4, "received data");
    assert_eq!([(); 2].map(|()| read(&other, 0)), *b"ab");
}

#[test]
fn a_restored_port_raises_what_its_driver_has_disabled_for_a_moment() {
    const IER_TRANSMIT: u8 = 2;
    let (port, line) = wired();
    let _ = port.write(1, &[IER_TRANSMIT]);
    let _ = port.write(0, b"a");
    assert_eq!(line.read().unwrap(), 1);
    // The kernel writes a message.
    let _ = port.write(1, &[0]);
    port.pause();
    let (other, line) = wired();
    other.restore(&port.save()).unwrap();
    other.resume();
    assert_eq!(line.read().unwrap(), 1);
    let _ = other.write(1, &[IER_TRANSMIT]);
    assert_eq!(read(&other, 2) & 0xf, 2, "transmitter empty");
    let _ = other.write(0, b"b");
    assert_eq!(line.read().unwrap(), 1, "and so on");
}

#[test]
fn output_goes_where_it_went_before_a_restore() {
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (port, sink) = (port(), Sink::default());
    *port.lock().writer_mut() = Box::new(sink.clone());
    let _ = port.write(0, b"a");
    port.restore(&port.save()).unwrap();
    let bad = SerialState {
        interrupt_enable: 0x10,
        ..port.save()
    };
    assert!(port.restore(&bad).is_err());
    port.resume();
    let _ = port.write(0, b"b");
    assert_eq!(*sink.0.lock().unwrap(), b"ab");
}

#[test]
fn states_that_no_guest_can_bring_about_are_refused() {
    use SerialStateError::*;
    let good = port().save();
    let with = |change: fn(&mut SerialState)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    let cases = [
        (with(|s| s.interrupt_enable = 0x10), Enable(0x10)),
        (with(|s| s.interrupt_identification = 0), Identification(0)),
        (with(|s| s.interrupt_identification = 3), Identification(3)),
        (
            with(|s| s.interrupt_identification = 0xc1),
            Identification(0xc1),
        ),
        (with(|s| s.interrupt_identification = 4), NothingReceived),
        (with(|s| s.input = vec![0; 65]), Input(65)),
    ];
    let port = port();
    for (state, error) in cases {
        assert_eq!(port.restore(&state), Err(error));
    }
    assert_eq!(port.save(), good);
    let full = with(|s| s.input = vec![7; 64]);
    assert_eq!(port.restore(&full), Ok(()));
    assert_eq!(port.save(), full);
    assert_eq!(read(&port, 5), 0x61, "data ready");
}

proptest! {
    /// Whatever a guest did: the saved form is accepted, is saved again as it is, and reads the same.
    #[test]
    fn every_state_survives(
        accesses in prop::collection::vec((0u64..8, prop::option::of(any::<u8>())), 0..80),
        input in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let port = port();
        for (offset, value) in accesses {
            match value {
                Some(value) => drop(port.write(offset, &[value])),
                None => drop(read(&port, offset)),
            }
            let _ = port.offer(&input);
        }
        port.pause();
        let state = port.save();
        let other = self::port();
        prop_assert_eq!(other.restore(&state), Ok(()));
        prop_assert_eq!(other.save(), state);
        for offset in [5, 6, 3, 4, 7, 2, 0, 1, 0, 5, 2] {
            prop_assert_eq!(read(&other, offset), read(&port, offset), "register {}", offset);
        }
    }
}
