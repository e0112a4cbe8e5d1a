//! What the guest does, told to everyone who listens: every change, in order, and its end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};

use super::{Event, State, UnderWay};
use crate::exit::Outcome;
use crate::machine::Machine;

/// Changes that wait for a slow listener.
const BACKLOG: usize = 64;
/// Time between two looks at what takes a while.
const LOOK: Duration = Duration::from_millis(100);

/// Tells what a machine does.
pub(super) struct States {
    /// What was told last. Whoever tells something has it, so that everybody hears it in one order.
    told: Mutex<Event>,
    events: broadcast::Sender<Event>,
}

impl States {
    /// Of a machine that is in `state`.
    pub fn new(state: State) -> Self {
        Self {
            told: Mutex::new(running(state)),
            events: broadcast::channel(BACKLOG).0,
        }
    }

    /// Of `machine`, which has it look from now on.
    pub fn of(machine: &Arc<Machine>) -> Arc<Self> {
        let states = Arc::new(Self::new(machine.state().into()));
        let (weak, looks) = (Arc::downgrade(machine), Arc::clone(&states));
        machine.on_change(Box::new(move || {
            if let Some(machine) = weak.upgrade() {
                looks.look(|| machine.state().into());
            }
        }));
        // It may have changed in between.
        states.look(|| machine.state().into());
        states
    }

    /// Tells what `state` says now, if that is something else than before. The end is told with its outcome, by
    /// [`Self::end`].
    pub fn look(&self, state: impl FnOnce() -> State) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = state();
        if now == State::Ended || told.state == State::Ended || now == told.state {
            return;
        }
        *told = running(now);
        // Nobody may be listening.
        let _ = self.events.send(told.clone());
    }

    /// Tells how the guest ended. Nothing is told after that.
    pub fn end(&self, outcome: &Outcome) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        *told = Event {
            state: State::Ended,
            outcome: Some(outcome.to_string()),
            exit_status: Some(outcome.status()),
        };
        let _ = self.events.send(told.clone());
    }

    /// What was told last, and everything that is told after it.
    pub fn subscribe(&self) -> (Event, broadcast::Receiver<Event>) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        (told.clone(), self.events.subscribe())
    }
}

fn running(state: State) -> Event {
    Event {
        state,
        outcome: None,
        exit_status: None,
    }
}

/// What a listener is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    State(Event),
    UnderWay(UnderWay),
}

/// Tells a listener every change of what the guest does, and, as often as it can be seen, of what takes a while: `work` is
/// asked for that. Ends after the end of the guest, before which nothing takes a while any more, or when nobody listens.
pub(super) async fn listen(
    states: Arc<States>,
    work: impl Fn() -> UnderWay,
    tell: mpsc::Sender<Told>,
) {
    let (now, mut changes) = states.subscribe();
    let mut change = Some(now);
    let mut told = UnderWay::default();
    let mut looks = tokio::time::interval(LOOK);
    loop {
        let ended = change
            .as_ref()
            .is_some_and(|event| event.state == State::Ended);
        if let Some(event) = change.take().filter(|_| !ended)
            && tell.send(Told::State(event)).await.is_err()
        {
            return;
        }
        let now = if ended { UnderWay::default() } else { work() };
        if now != told {
            told = now.clone();
            if tell.send(Told::UnderWay(now)).await.is_err() {
                return;
            }
        }
        if ended {
            let (end, _) = states.subscribe();
            let _ = tell.send(Told::State(end)).await;
            return;
        }
        tokio::select! {
            biased;
            event = changes.recv() => match event {
                Ok(event) => change = Some(event),
                // One that cannot keep up misses some; the next one tells the state again.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            () = tell.closed() => return,
            _ = looks.tick() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::monitor::Status;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().build().unwrap().block_on(future)
    }

    fn moving(round: u32) -> UnderWay {
        UnderWay {
            progress: None,
            migration: Some(Status::Destination { round, pages: 0 }),
        }
    }

    #[test]
    fn every_change_is_told_in_order_and_the_end_comes_last() {
        let states = Arc::new(States::new(State::Running));
        let (tell, mut told) = mpsc::channel(1);
        let heard = run(async {
            let listening = tokio::spawn(listen(Arc::clone(&states), || moving(1), tell));
            let mut heard = vec![told.recv().await.unwrap()];
            // Faster than anybody looks.
            let path = [State::Saving, State::Running, State::Migrating];
            for state in path {
                states.look(|| state);
                states.look(|| state);
            }
            states.look(|| State::Ended);
            states.end(&Outcome::Moved("there".to_owned()));
            states.look(|| State::Running);
            while let Some(event) = told.recv().await {
                heard.push(event);
            }
            listening.await.unwrap();
            heard
        });
        let end = Event {
            state: State::Ended,
            outcome: Some(Outcome::Moved("there".to_owned()).to_string()),
            exit_status: Some(8),
        };
        let expected = [
            Told::State(running(State::Running)),
            Told::UnderWay(moving(1)),
            Told::State(running(State::Saving)),
            Told::State(running(State::Running)),
            Told::State(running(State::Migrating)),
            Told::UnderWay(UnderWay::default()),
            Told::State(end),
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn whoever_comes_late_is_told_the_end() {
        let states = Arc::new(States::new(State::Running));
        states.end(&Outcome::PowerOff);
        let (tell, mut told) = mpsc::channel(1);
        let heard = run(async {
            tokio::spawn(listen(states, UnderWay::default, tell));
            (told.recv().await, told.recv().await)
        });
        let (Some(Told::State(event)), None) = heard else {
            panic!("{heard:?}");
        };
        assert_eq!((event.state, event.exit_status), (State::Ended, Some(0)));
    }

    #[test]
    fn nobody_is_told_anything_who_has_gone() {
        let states = Arc::new(States::new(State::Running));
        let (tell, told) = mpsc::channel(1);
        drop(told);
        run(listen(states, UnderWay::default, tell));
    }
}
