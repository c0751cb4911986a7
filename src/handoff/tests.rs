use super::*;

const READY: HandoffOutcome = HandoffOutcome::Ready {
    chunks: 3,
    already_stored: false,
};

#[tokio::test]
async fn a_ticket_sees_open_then_the_first_outcome_only() {
    let board = HandoffBoard::default();
    let mut ticket = board.register(HandoffId::from("a"));
    assert_eq!(ticket.state(), HandoffState::Expected);
    board.opened(&"a".into());
    assert_eq!(ticket.state(), HandoffState::Open);
    board.settle(&"a".into(), READY);
    board.settle(&"a".into(), HandoffOutcome::Failed(HandoffFailure::Aborted));
    board.opened(&"a".into());
    assert_eq!(ticket.settled().await, READY);
    assert_eq!(ticket.state(), HandoffState::Settled(READY));
}

#[tokio::test]
async fn an_outcome_before_the_wait_is_not_lost() {
    let board = HandoffBoard::default();
    let mut ticket = board.register(HandoffId::from("a"));
    board.settle(&"a".into(), READY);
    assert_eq!(ticket.settled().await, READY);
    assert_eq!(ticket.settled().await, READY);
}

#[tokio::test]
async fn dropping_the_ticket_removes_the_entry() {
    let board = HandoffBoard::default();
    let ticket = board.register(HandoffId::random());
    assert_eq!(board.waiting(), 1);
    drop(ticket);
    assert_eq!(board.waiting(), 0);
    board.settle(&"unknown".into(), READY);
    assert_eq!(board.waiting(), 0);
}

#[test]
fn the_engine_learns_who_left_unless_nothing_is_held_for_them() {
    let board = HandoffBoard::default();
    drop(board.register(HandoffId::from("before there was an engine")));
    assert!(board.lock().abandoned.is_none(), "kept for nobody");
    assert!(board.take_abandoned().is_empty());
    let [waiting, ready, failed] = ["waiting", "ready", "failed"].map(HandoffId::from);
    let tickets = [&waiting, &ready, &failed].map(|id| board.register(id.clone()));
    board.settle(&ready, READY);
    board.settle(
        &failed,
        HandoffOutcome::Failed(HandoffFailure::ProducerDied),
    );
    assert!(board.take_abandoned().is_empty());
    drop(tickets);
    let mut left = board.take_abandoned();
    left.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    assert_eq!(left, [ready, waiting]);
    assert!(board.take_abandoned().is_empty());
    for n in 0..MAX_ABANDONED + 1 {
        drop(board.register(HandoffId::from(format!("{n}").as_str())));
    }
    assert_eq!(board.take_abandoned().len(), MAX_ABANDONED);
}

#[test]
fn what_was_said_early_is_known_at_once_and_the_oldest_is_forgotten() {
    let board = HandoffBoard::default();
    let [opened, ended] = ["opened", "ended"].map(HandoffId::from);
    board.opened(&opened);
    board.opened(&ended);
    board.settle(&ended, READY);
    board.opened(&ended);
    let known = [&opened, &ended].map(|id| board.register(id.clone()).state());
    assert_eq!(known, [HandoffState::Open, HandoffState::Settled(READY)]);
    board.opened(&opened);
    for n in 0..MAX_EARLY {
        board.opened(&HandoffId::from(format!("{n}").as_str()));
    }
    assert_eq!(board.register(opened).state(), HandoffState::Expected);
    let board = board.lock();
    assert!(board.early.states.len() <= MAX_EARLY && board.early.order.len() <= MAX_EARLY);
}

#[tokio::test]
async fn a_follower_hears_everything_or_the_board_is_off() {
    const DOWN: HandoffState =
        HandoffState::Settled(HandoffOutcome::Failed(HandoffFailure::EngineDown));
    let board = HandoffBoard::default();
    board.fail_all(HandoffFailure::EngineDown);
    let mut changes = board.follow(2);
    let [a, b] = ["a", "b"].map(HandoffId::from);
    let ticket = board.register(a.clone());
    assert_eq!(ticket.state(), HandoffState::Expected);
    drop(ticket);
    assert_eq!(changes.recv().await, Some(Change::Awaited(a.clone())));
    assert_eq!(changes.recv().await, Some(Change::Left(a)));
    assert!(board.take_abandoned().is_empty());

    let tickets = [(), (), ()].map(|()| board.register(b.clone()));
    assert_eq!(tickets.map(|ticket| ticket.state())[2], DOWN);
    assert_eq!(changes.recv().await, Some(Change::Awaited(b.clone())));
    assert_eq!(changes.recv().await, Some(Change::Awaited(b.clone())));
    assert_eq!(changes.recv().await, None);

    let mut again = board.follow(2);
    let ticket = board.register(b.clone());
    assert_eq!(ticket.state(), HandoffState::Expected);
    board.fail_all(HandoffFailure::EngineDown);
    assert_eq!(ticket.state(), DOWN);
    assert_eq!(again.recv().await, Some(Change::Awaited(b)));
    assert_eq!(again.recv().await, None);
}

#[test]
fn every_failure_is_found_by_its_label() {
    for failure in HandoffFailure::ALL {
        assert_eq!(HandoffFailure::from_label(failure.label()), Some(failure));
    }
    assert_eq!(HandoffFailure::from_label("whatever"), None);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_is_a_typed_failure() {
    let board = HandoffBoard::default();
    let mut ticket = board.register(HandoffId::random());
    let outcome = ticket.settled_within(Duration::from_secs(30)).await;
    assert_eq!(outcome, HandoffOutcome::Failed(HandoffFailure::Deadline));
}

#[tokio::test]
async fn turning_the_store_off_wakes_everybody() {
    let board = HandoffBoard::default();
    let mut one = board.register(HandoffId::random());
    let mut two = board.register(HandoffId::random());
    board.fail_all(HandoffFailure::EngineDown);
    let down = HandoffOutcome::Failed(HandoffFailure::EngineDown);
    assert_eq!((one.settled().await, two.settled().await), (down, down));
    let late = board.register(HandoffId::random());
    assert_eq!(late.state(), HandoffState::Settled(down));
}
