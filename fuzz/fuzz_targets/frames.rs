//! Bytes from a peer that knows the token, into a real engine on a real socket.
#![no_main]

#[path = "../rig.rs"]
mod rig;

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use rig::Rig;

thread_local! {
    static RIG: RefCell<Rig> = RefCell::new(Rig::start());
}

fuzz_target!(|input: &[u8]| {
    rig::check_decoding(input);
    RIG.with_borrow_mut(|rig| {
        rig.feed(input);
        rig.assert_unharmed();
    });
});
