//! Every order of messages, losses and crashes, through the state machines that decide.
//!
//! A world has both ends, one connection that delivers in order and can be lost at any moment together with any suffix of
//! what is on its way, and questions on connections of their own. What was on its way when an end gave the connection up may
//! still be read by the other: it lies in the receive buffer there.

use std::collections::VecDeque;

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::*;

/// A message of the protocol, as far as it decides anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// All pages and state.
    Complete,
    Prepared,
    Commit,
    Running,
    Refuse,
    Cancel,
    Bye,
}

/// A question on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    None,
    /// On its way to the destination.
    Asked,
    /// The answer is on its way back.
    Answered(Outcome),
}

/// The connection as one end sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Link {
    Up,
    /// Lost, which this end has not noticed: what arrived before can be read, and what is sent goes nowhere.
    Cut,
    /// Given up by this end: nothing is read any more.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct End<S> {
    machine: S,
    alive: bool,
    /// The guest runs here: follows the actions of the machine, not its state.
    runs: bool,
    link: Link,
    /// What will arrive here.
    arriving: VecDeque<Message>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    source: End<Source>,
    destination: End<Destination>,
    /// The source has sent all pages and state.
    sent: bool,
    question: Question,
    /// A question that the source has given up may still reach the destination.
    late: bool,
    /// The source has heard an answer of the destination.
    answered: bool,
    /// How many questions or answers may still get lost, or reach somebody who knows nothing.
    losses: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    SourceSends,
    SourceCancels,
    SourceReads,
    /// It notices that the connection is gone, or takes it to be.
    SourceGivesUp,
    SourceAsks,
    SourceHears,
    /// By a person, who is right.
    Resolved(Resolution),
    /// What it reads succeeds, or cannot be done.
    DestinationReads {
        fails: bool,
    },
    DestinationGivesUp,
    DestinationAnswers,
    /// Somebody else has its address.
    StrangerAnswers,
    QuestionLost,
    /// Nobody hears the answer.
    LateQuestionArrives,
    /// The first messages in each direction arrive, the others do not.
    Cut {
        to_source: usize,
        to_destination: usize,
    },
    SourceCrashes,
    DestinationCrashes,
}

type OnSource = fn(Source, SourceEvent) -> (Source, SourceAction);
type OnDestination = fn(Destination, DestinationEvent) -> (Destination, DestinationAction);

/// The machines under test, and what may happen to them.
#[derive(Clone)]
struct World {
    source: OnSource,
    destination: OnDestination,
    /// A person ends doubts.
    person: bool,
    crashes: bool,
}

impl World {
    fn on_source(&self, state: &mut State, event: SourceEvent) {
        let (machine, action) = (self.source)(state.source.machine, event);
        state.source.machine = machine;
        match action {
            SourceAction::Commit => {
                state.source.runs = false;
                state.tell_destination(Message::Commit);
            }
            SourceAction::Resume => {
                state.source.runs = true;
                state.source.close();
            }
            SourceAction::End => {
                state.tell_destination(Message::Bye);
                state.source.close();
            }
            SourceAction::Ask => state.source.close(),
            SourceAction::Nothing => {}
        }
    }

    fn on_destination(&self, state: &mut State, event: DestinationEvent) {
        let (machine, action) = (self.destination)(state.destination.machine, event);
        state.destination.machine = machine;
        match action {
            DestinationAction::Prepared => state.tell_source(Message::Prepared),
            DestinationAction::Run => {
                state.destination.runs = true;
                state.tell_source(Message::Running);
            }
            DestinationAction::Discard => {
                state.tell_source(Message::Refuse);
                state.destination.close();
            }
            DestinationAction::Answer(outcome) => state.question = Question::Answered(outcome),
            DestinationAction::Nothing => {}
        }
    }

    fn source_reads(&self, state: &mut State) {
        let event = match state.source.arriving.pop_front() {
            Some(Message::Prepared) => SourceEvent::Prepared,
            Some(Message::Running) => SourceEvent::Running,
            Some(Message::Refuse) => SourceEvent::Refused,
            _ => return,
        };
        self.on_source(state, event);
    }

    fn destination_reads(&self, state: &mut State, fails: bool) {
        let event = match state.destination.arriving.pop_front() {
            Some(Message::Complete | Message::Commit) if fails => DestinationEvent::Failed,
            Some(Message::Complete) => DestinationEvent::Restored,
            Some(Message::Commit) => DestinationEvent::Commit,
            Some(Message::Cancel) => DestinationEvent::Failed,
            _ => return,
        };
        self.on_destination(state, event);
    }
}

impl<S> End<S> {
    fn new(machine: S, runs: bool) -> Self {
        Self {
            machine,
            alive: true,
            runs,
            link: Link::Up,
            arriving: VecDeque::new(),
        }
    }

    fn close(&mut self) {
        self.link = Link::Closed;
        self.arriving.clear();
    }

    fn crash(&mut self) {
        self.alive = false;
        self.runs = false;
        self.close();
    }

    fn reads(&self) -> bool {
        self.alive && !self.arriving.is_empty()
    }
}

impl State {
    fn tell_source(&mut self, message: Message) {
        if self.destination.link == Link::Up && self.source.link != Link::Closed {
            self.source.arriving.push_back(message);
        }
    }

    fn tell_destination(&mut self, message: Message) {
        if self.source.link == Link::Up && self.destination.link != Link::Closed {
            self.destination.arriving.push_back(message);
        }
    }

    /// Neither end can send to the other any more.
    fn cut(&mut self) {
        for link in [&mut self.source.link, &mut self.destination.link] {
            if *link == Link::Up {
                *link = Link::Cut;
            }
        }
    }

    /// Nothing but a crash of the destination keeps it from running the guest later.
    fn destination_may_still_run(&self) -> bool {
        let undecided = [Destination::Receiving, Destination::Prepared];
        self.destination.alive && undecided.contains(&self.destination.machine)
    }

    fn on_the_way(&self) -> bool {
        !self.source.arriving.is_empty()
            || !self.destination.arriving.is_empty()
            || self.question != Question::None
    }
}

impl Model for World {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            source: End::new(Source::Moving, true),
            destination: End::new(Destination::Receiving, false),
            sent: false,
            question: Question::None,
            late: false,
            answered: false,
            losses: 2,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        let (source, destination) = (&state.source, &state.destination);
        if source.alive {
            let moving = source.machine == Source::Moving;
            if moving && !state.sent {
                steps.push(Step::SourceSends);
            }
            if moving {
                steps.push(Step::SourceCancels);
            }
            if source.reads() {
                steps.push(Step::SourceReads);
            }
            if source.link != Link::Closed {
                steps.push(Step::SourceGivesUp);
            }
            if source.machine == Source::InDoubt && state.question == Question::None {
                steps.push(Step::SourceAsks);
            }
            if matches!(state.question, Question::Answered(_)) {
                steps.push(Step::SourceHears);
            }
            if self.person && source.machine == Source::InDoubt {
                if destination.runs {
                    steps.push(Step::Resolved(Resolution::Discard));
                } else if !state.destination_may_still_run() {
                    steps.push(Step::Resolved(Resolution::Run));
                }
            }
            if self.crashes {
                steps.push(Step::SourceCrashes);
            }
        }
        if destination.alive {
            if destination.reads() {
                steps.push(Step::DestinationReads { fails: false });
                steps.push(Step::DestinationReads { fails: true });
            }
            if destination.link != Link::Closed {
                steps.push(Step::DestinationGivesUp);
            }
            if state.question == Question::Asked {
                steps.push(Step::DestinationAnswers);
            }
            if state.late {
                steps.push(Step::LateQuestionArrives);
            }
            if self.crashes {
                steps.push(Step::DestinationCrashes);
            }
        }
        if state.losses > 0 && state.question != Question::None {
            steps.push(Step::QuestionLost);
        }
        if state.losses > 0 && state.question == Question::Asked {
            steps.push(Step::StrangerAnswers);
        }
        if source.link == Link::Up || destination.link == Link::Up {
            for to_source in 0..=source.arriving.len() {
                for to_destination in 0..=destination.arriving.len() {
                    steps.push(Step::Cut {
                        to_source,
                        to_destination,
                    });
                }
            }
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::SourceSends => {
                state.sent = true;
                state.tell_destination(Message::Complete);
            }
            Step::SourceCancels => {
                state.tell_destination(Message::Cancel);
                self.on_source(&mut state, SourceEvent::Failed);
            }
            Step::SourceReads => self.source_reads(&mut state),
            Step::SourceGivesUp => {
                state.source.close();
                self.on_source(&mut state, SourceEvent::Lost);
            }
            Step::SourceAsks => state.question = Question::Asked,
            Step::SourceHears => {
                let Question::Answered(outcome) = state.question else {
                    return None;
                };
                state.question = Question::None;
                state.answered |= outcome != Outcome::Unknown;
                self.on_source(&mut state, SourceEvent::Outcome(outcome));
            }
            Step::Resolved(how) => self.on_source(&mut state, SourceEvent::Resolve(how)),
            Step::DestinationReads { fails } => self.destination_reads(&mut state, fails),
            Step::DestinationGivesUp => {
                state.destination.close();
                self.on_destination(&mut state, DestinationEvent::Failed);
            }
            Step::DestinationAnswers => self.on_destination(&mut state, DestinationEvent::Asked),
            Step::StrangerAnswers => {
                state.losses -= 1;
                state.question = Question::Answered(Outcome::Unknown);
            }
            Step::QuestionLost => {
                state.losses -= 1;
                state.late |= state.question == Question::Asked;
                state.question = Question::None;
            }
            Step::LateQuestionArrives => {
                let current = state.question;
                state.late = false;
                self.on_destination(&mut state, DestinationEvent::Asked);
                state.question = current;
            }
            Step::Cut {
                to_source,
                to_destination,
            } => {
                state.cut();
                state.source.arriving.truncate(to_source);
                state.destination.arriving.truncate(to_destination);
            }
            Step::SourceCrashes => state.source.crash(),
            Step::DestinationCrashes => state.destination.crash(),
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NEVER_BOTH, |_, state: &State| {
                !(state.source.runs && state.destination.runs)
            }),
            Property::always(NEITHER_FOR_A_REASON, |_, state: &State| {
                let crashed = !state.source.alive || !state.destination.alive;
                // It learns of the loss of its connection at the latest when its patience ends.
                let lost =
                    state.source.machine == Source::Committing && state.source.link == Link::Cut;
                let closed = state.source.machine == Source::Committing
                    && state.destination.link == Link::Closed;
                state.source.runs
                    || state.destination.runs
                    || state.source.machine == Source::InDoubt
                    || state.on_the_way()
                    || crashed
                    || lost
                    || closed
            }),
            Property::always(ONE_OWNER_IN_THE_END, |world: &Self, state: &State| {
                let mut steps = Vec::new();
                world.actions(state, &mut steps);
                // A step that changes nothing is none; crashes are no way to end anything.
                let ends = steps.iter().all(|step| {
                    let crash = [Step::SourceCrashes, Step::DestinationCrashes].contains(step);
                    crash || world.next_state(state, *step).is_none()
                });
                let crashed = !state.source.alive || !state.destination.alive;
                !ends || crashed || state.source.runs != state.destination.runs
            }),
            // With the one before: questions that are answered in the end do end.
            Property::always(AN_ANSWER_ENDS_IT, |_, state: &State| {
                !state.answered || state.source.machine != Source::InDoubt
            }),
            Property::always(WHAT_MACHINES_SAY_IS_TRUE, |_, state: &State| {
                let (source, destination) = (&state.source, &state.destination);
                (!source.runs || source.machine.may_run())
                    && (!destination.runs || destination.machine == Destination::Running)
            }),
            Property::sometimes("moved", |_, state: &State| {
                state.source.machine == Source::Moved && state.destination.runs
            }),
            Property::sometimes("kept", |_, state: &State| {
                state.source.machine == Source::Kept && state.source.runs
            }),
            Property::sometimes("in doubt", |_, state: &State| {
                state.source.machine == Source::InDoubt
            }),
            Property::sometimes("moved after doubt", |_, state: &State| {
                let asked = state.question == Question::Answered(Outcome::Running);
                asked && state.source.machine == Source::InDoubt
            }),
            Property::sometimes("a commit that is read too late", |_, state: &State| {
                state.source.machine == Source::Kept
                    && state.destination.arriving.front() == Some(&Message::Commit)
            }),
        ]
    }
}

const NEVER_BOTH: &str = "never do both run the guest";
const NEITHER_FOR_A_REASON: &str =
    "neither runs it only in doubt, after a crash, or while something is on its way";
const ONE_OWNER_IN_THE_END: &str = "without a crash, one runs it in the end";
const AN_ANSWER_ENDS_IT: &str = "no doubt is left after an answer";
const WHAT_MACHINES_SAY_IS_TRUE: &str = "the guest runs only where the machine says that it may";

const REAL: World = World {
    source: Source::on,
    destination: Destination::on,
    person: true,
    crashes: true,
};

#[test]
fn the_guest_has_one_owner_whatever_gets_lost_or_crashes() {
    for (person, crashes) in [(false, false), (true, false), (false, true), (true, true)] {
        let world = World {
            person,
            crashes,
            ..REAL
        };
        let checker = world.checker().spawn_bfs().join();
        checker.assert_properties();
        // A world in which little can happen shows little.
        let states = checker.unique_state_count();
        assert!(states > 200, "{states} states");
    }
}

/// One wrong transition each: what the check is worth.
#[test]
fn a_wrong_transition_violates_a_property() {
    let source = |source| World { source, ..REAL };
    let destination = |destination| World {
        destination,
        ..REAL
    };
    let table: &[(&str, World, &str)] = &[
        (
            "the source resumes when the connection is lost after the commit",
            source(|state, event| match (state, event) {
                (Source::Committing, SourceEvent::Lost) => (Source::Kept, SourceAction::Resume),
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the source takes ignorance for a no",
            source(|state, event| match (state, event) {
                (Source::InDoubt, SourceEvent::Outcome(Outcome::Unknown)) => {
                    (Source::Kept, SourceAction::Resume)
                }
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the source ends although the guest was discarded",
            source(|state, event| match (state, event) {
                (Source::InDoubt, SourceEvent::Outcome(Outcome::Discarded)) => {
                    (Source::Moved, SourceAction::End)
                }
                _ => state.on(event),
            }),
            ONE_OWNER_IN_THE_END,
        ),
        (
            "the source never ends its doubt",
            source(|state, event| match (state, event) {
                (Source::InDoubt, SourceEvent::Outcome(_) | SourceEvent::Resolve(_)) => {
                    (state, SourceAction::Nothing)
                }
                _ => state.on(event),
            }),
            AN_ANSWER_ENDS_IT,
        ),
        (
            "the source goes on after its commit as if it could be called off",
            source(|state, event| match (state, event) {
                (Source::Moving, SourceEvent::Prepared) => (Source::Moving, SourceAction::Commit),
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the destination says that it discarded the guest, and still takes a commit",
            destination(|state, event| match (state, event) {
                (Destination::Prepared, DestinationEvent::Asked) => {
                    (state, DestinationAction::Answer(Outcome::Discarded))
                }
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the destination runs what it discarded",
            destination(|state, event| match (state, event) {
                (Destination::Discarded, DestinationEvent::Commit) => {
                    (Destination::Running, DestinationAction::Run)
                }
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the destination denies that it runs the guest",
            destination(|state, event| match (state, event) {
                (Destination::Running, DestinationEvent::Asked) => {
                    (state, DestinationAction::Answer(Outcome::Discarded))
                }
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the destination runs the guest when it is prepared",
            destination(|state, event| match (state, event) {
                (Destination::Receiving, DestinationEvent::Restored) => {
                    (Destination::Running, DestinationAction::Run)
                }
                _ => state.on(event),
            }),
            NEVER_BOTH,
        ),
        (
            "the destination does not hear the commit",
            destination(|state, event| match (state, event) {
                (Destination::Prepared, DestinationEvent::Commit) => {
                    (state, DestinationAction::Nothing)
                }
                _ => state.on(event),
            }),
            NEITHER_FOR_A_REASON,
        ),
    ];
    for (what, world, violated) in table {
        let checker = world.clone().checker();
        let checker = checker
            .finish_when(HasDiscoveries::AllOf([*violated].into()))
            .spawn_bfs()
            .join();
        assert!(checker.discovery(violated).is_some(), "{what}: {violated}");
    }
}
