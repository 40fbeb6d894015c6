//! Orders of an operator: a stream is restarted, disabled or enabled.

use std::io;

use super::Streams;
use crate::{
    config::plan::Plan,
    control::{Action, Answer, Order},
    daemon::holds::{Hold, Why},
    frame::State,
};

impl Streams {
    /// Refuses an order that could not be written down, and that the next start would not follow.
    fn unwritten(&mut self, id: &str, before: Option<Hold>, error: &io::Error) -> Answer {
        self.holds.undo(id, before);
        Answer::Refused(format!("nothing is changed: it could not be written down: {error}"))
    }

    /// Carries out an order and answers it.
    pub(in crate::daemon) fn obey(&mut self, order: Order, plan: &Plan) {
        if order.is_given_up() {
            return;
        }
        let answer = self.answer(order.action, &order.stream, plan);
        match &answer {
            Answer::Done(text) => tracing::info!(stream = order.stream, "by order: {text}"),
            Answer::Unknown(text) | Answer::Refused(text) => {
                tracing::warn!(stream = order.stream, "an order was refused: {text}");
            }
        }
        order.answer(answer);
    }

    fn answer(&mut self, action: Action, id: &str, plan: &Plan) -> Answer {
        let Some(configured) = plan.streams.get(id) else {
            let all: Vec<_> = plan.streams.keys().map(String::as_str).collect();
            let text = format!("there is no such stream; configured: {}", all.join(", "));
            return Answer::Unknown(text);
        };
        let why = self.holds.get(id).map(|it| it.why);
        match (action, why) {
            (Action::Restart, Some(why)) => {
                let why = why.name();
                let text = format!("{id} is {why}: `ghostwatch streams enable {id}` opens it");
                Answer::Refused(text)
            }
            (Action::Enable, None) => Answer::Done(format!("{id} is enabled already")),
            (Action::Restart, None) => {
                self.finished.remove(id);
                self.again(id, configured);
                Answer::Done(format!("{id} is opened anew"))
            }
            (Action::Enable, Some(_)) => {
                let before = self.holds.get(id).cloned();
                if let Err(error) = self.forgive(id) {
                    return self.unwritten(id, before, &error);
                }
                self.finished.remove(id);
                self.again(id, configured);
                Answer::Done(format!("{id} is opened again"))
            }
            (Action::Disable, Some(Why::Disabled)) => {
                Answer::Done(format!("{id} is disabled already"))
            }
            (Action::Disable, _) => self.disable(id),
        }
    }

    fn disable(&mut self, id: &str) -> Answer {
        let before = self.holds.get(id).cloned();
        let hold = Hold::disabled();
        let leave = hold.leave();
        if let Err(error) = self.holds.put(id, hold) {
            return self.unwritten(id, before, &error);
        }
        if let Some(it) = self.running.get(id) {
            if it.stream.state() == State::Ended {
                self.finished.insert(id.to_owned());
            }
            // Set already iff it is quarantined: see `tick`.
            it.leave.set(leave).ok();
            it.stop.cancel();
        }
        Answer::Done(format!("{id} is disabled, until it is enabled again"))
    }
}
