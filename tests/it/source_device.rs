//! Decoders of devices, and what becomes of a stream whose device fails. None is there: one that
//! fails at its first picture stands for it.

use std::sync::Arc;

use ghostwatch::{
    frame::{Code, State},
    ledger::Stream,
    source::{Decode, End, Settings, Spec, gst::GstOpener},
};
use gstreamer::{self as gst, glib, prelude::*, subclass::prelude::*};

use crate::source::{Ran, clip, run_opener, spec};

glib::wrapper! {
    struct Failing(ObjectSubclass<imp::Failing>) @extends gst::Element, gst::Object;
}

mod imp {
    use std::sync::LazyLock;

    use super::*;

    #[derive(Default)]
    pub(super) struct Failing;

    #[glib::object_subclass]
    impl ObjectSubclass for Failing {
        const NAME: &'static str = "GhostwatchFailingDecoder";
        type Type = super::Failing;
        type ParentType = gst::Element;
    }

    fn template(name: &str, direction: gst::PadDirection, caps: &str) -> gst::PadTemplate {
        let caps = caps.parse().unwrap();
        gst::PadTemplate::new(name, direction, gst::PadPresence::Always, &caps).unwrap()
    }

    impl ObjectImpl for Failing {
        fn constructed(&self) {
            self.parent_constructed();
            let element = self.obj();
            let template = |name| element.pad_template(name).unwrap();
            let sink = gst::Pad::builder_from_template(&template("sink"))
                .chain_function(|_, parent, _| {
                    let element = parent.unwrap().downcast_ref::<gst::Element>().unwrap();
                    gst::element_error!(element, gst::StreamError::Decode, ["the device is lost"]);
                    Err(gst::FlowError::Error)
                })
                .build();
            element.add_pad(&sink).unwrap();
            element.add_pad(&gst::Pad::from_template(&template("src"))).unwrap();
        }
    }

    impl GstObjectImpl for Failing {}

    impl ElementImpl for Failing {
        fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
            static DATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
                let kind = "Codec/Decoder/Video/Hardware";
                gst::subclass::ElementMetadata::new("Failing decoder", kind, "Fails", "tests")
            });
            Some(&DATA)
        }

        fn pad_templates() -> &'static [gst::PadTemplate] {
            static PADS: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
                vec![
                    template("sink", gst::PadDirection::Sink, "video/x-h264"),
                    template("src", gst::PadDirection::Src, "video/x-raw"),
                ]
            });
            &PADS
        }
    }
}

fn run(decode: Decode) -> Ran {
    let spec = Spec { decode, ..spec(clip("carphone_pristine.mp4").to_str().unwrap()) };
    let stream = Arc::new(Stream::new("test"));
    let mut opener = GstOpener::new(spec.clone(), stream.clone()).unwrap();
    let ran = run_opener(&mut opener, Settings::new(&spec, 0), stream, |_| false);
    ran.check_account();
    ran
}

#[test]
fn a_stream_whose_device_fails_is_opened_again_without_it_and_says_why() {
    gst::init().unwrap();
    // A name like those of VA-API's decoders, and a low rank: others must not find it.
    gst::Element::register(None, "vafailingh264dec", gst::Rank::MARGINAL, Failing::static_type())
        .unwrap();
    let ran = run(Decode::Va);
    assert_eq!((ran.end, ran.frames().count()), (End::Ended, 120));
    assert_eq!(ran.states()[1], (State::Down, Some(Code::Codec)), "{:?}", ran.states());
    let (name, why) = ran.stream.decoder().unwrap();
    assert_eq!(name, "avdec_h264");
    assert!(why.contains("; vafailingh264dec failed: "), "{why}");
    assert!(why.contains("the device is lost"), "{why}");

    let ran = run(Decode::Software);
    assert_eq!((ran.end, ran.frames().count()), (End::Ended, 120));
    let why = ran.stream.decoder().unwrap().1;
    assert!(why.contains("`decode` is software, so not"), "{why}");
}
