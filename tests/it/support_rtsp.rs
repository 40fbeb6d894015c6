//! A real RTSP server in the test's own process.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use gstreamer::{self as gst, glib};
use gstreamer_rtsp_server::{self as server, prelude::*};

/// What the server sends at `/stream`: H.264 unless it says otherwise.
#[derive(Clone, Debug)]
pub(crate) enum Media {
    /// A moving test pattern without end.
    Pattern {
        /// Width and height in pixels.
        size: (u32, u32),
        /// Pictures per second.
        fps: u32,
    },
    /// The same, whose shape may change; see [`Server::reshape`].
    Changing {
        /// Width and height in pixels.
        size: (u32, u32),
        /// Pictures per second.
        fps: u32,
    },
    /// The same as H.265.
    H265 {
        /// Width and height in pixels.
        size: (u32, u32),
        /// Pictures per second.
        fps: u32,
    },
    /// The same as JPEG pictures.
    Jpeg {
        /// Width and height in pixels.
        size: (u32, u32),
        /// Pictures per second.
        fps: u32,
    },
    /// The H.265 stream of an MP4 file, in its own time.
    H265File(PathBuf),
    /// The H.264 stream of an MP4 file, so many times over, in its own time.
    File {
        /// The file.
        path: PathBuf,
        /// How many times.
        times: usize,
    },
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    port: u16,
    tls: bool,
    server: server::RTSPServer,
    main_loop: glib::MainLoop,
    thread: Option<JoinHandle<()>>,
    /// What decides on the shape of a [`Media::Changing`], once somebody looks at it.
    shape: Arc<Mutex<Option<gst::Element>>>,
}

impl Server {
    /// Starts one on `port` of the loopback interface, 0 for a free one. With `user` it wants that
    /// name and password.
    pub(crate) fn start(media: &Media, port: u16, user: Option<(&str, &str)>) -> Server {
        Server::start_on(media, port, user, None)
    }

    /// Starts one that is reached by TLS only and shows this certificate: it and its key, in PEM.
    pub(crate) fn start_tls(media: &Media, certificate: &str) -> Server {
        Server::start_on(media, 0, None, Some(certificate))
    }

    fn start_on(
        media: &Media,
        port: u16,
        user: Option<(&str, &str)>,
        certificate: Option<&str>,
    ) -> Server {
        gst::init().expect("GStreamer starts");
        let context = glib::MainContext::new();
        let server = server::RTSPServer::new();
        server.set_address("127.0.0.1");
        server.set_service(&port.to_string());
        let factory = server::RTSPMediaFactory::new();
        factory.set_launch(&launch(media));
        factory.set_shared(true);
        let shape = Arc::new(Mutex::new(None));
        let found = shape.clone();
        factory.connect_media_configure(move |_, media| {
            let bin = media.element().downcast::<gst::Bin>().expect("a launch line makes a bin");
            *found.lock().unwrap() = bin.by_name("shape");
        });
        if user.is_some() || certificate.is_some() {
            server.set_auth(Some(&auth(user, certificate)));
            let role = gst::Structure::builder("viewer")
                .field("media.factory.access", true)
                .field("media.factory.construct", true)
                .build();
            factory.add_role_from_structure(&role);
        }
        let mounts = server.mount_points().expect("a new server has mount points");
        mounts.add_factory("/stream", factory);
        // The server listens once this returns; the loop below only answers.
        let id = server.attach(Some(&context)).expect("the port is free");
        let port = u16::try_from(server.bound_port()).expect("a port");
        let main_loop = glib::MainLoop::new(Some(&context), false);
        let running = main_loop.clone();
        let thread = thread::Builder::new()
            .name("rtsp-server".to_owned())
            .spawn(move || {
                running.run();
                // Removing the source closes the socket, so that the port is free again.
                if let Some(source) = running.context().find_source_by_id(&id) {
                    source.destroy();
                }
            })
            .expect("a thread");
        let tls = certificate.is_some();
        Server { port, tls, server, main_loop, thread: Some(thread), shape }
    }

    /// Goes on with pictures of another size and rate, within the connections that there are.
    pub(crate) fn reshape(&self, (width, height): (u32, u32), fps: u32) {
        let caps = pattern_caps((width, height), fps).parse::<gst::Caps>().unwrap();
        self.shape.lock().unwrap().as_ref().expect("somebody looks").set_property("caps", caps);
    }

    /// The port that it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The stream's URL.
    pub(crate) fn url(&self) -> String {
        let s = if self.tls { "s" } else { "" };
        format!("rtsp{s}://127.0.0.1:{}/stream", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.server.client_filter(Some(&mut |_, _| server::RTSPFilterResult::Remove));
        // Told inside the loop: a quit that comes before the thread has begun to run is forgotten, and
        // a test that fails just then would hang instead.
        let running = self.main_loop.clone();
        let quit = glib::idle_source_new(None, glib::Priority::DEFAULT, move || {
            running.quit();
            glib::ControlFlow::Break
        });
        quit.attach(Some(&self.main_loop.context()));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server's thread ends in order");
        }
    }
}

/// Who may see the stream, and with what certificate it is shown.
fn auth(user: Option<(&str, &str)>, certificate: Option<&str>) -> server::RTSPAuth {
    let auth = server::RTSPAuth::new();
    let mut token = server::RTSPToken::builder().field("media.factory.role", "viewer").build();
    match user {
        Some((name, password)) => {
            auth.add_basic(&server::RTSPAuth::make_basic(name, password), &token);
        }
        None => auth.set_default_token(Some(&mut token)),
    }
    if let Some(pem) = certificate {
        let certificate = gio::TlsCertificate::from_pem(pem).expect("a certificate and its key");
        auth.set_tls_certificate(Some(&certificate));
    }
    auth
}

fn pattern_caps((width, height): (u32, u32), fps: u32) -> String {
    format!("video/x-raw,format=I420,width={width},height={height},framerate={fps}/1")
}

fn launch(media: &Media) -> String {
    let pay = "rtph264pay name=pay0 pt=96 config-interval=-1";
    match media {
        Media::Pattern { size, fps } => format!(
            "( videotestsrc is-live=true pattern=ball ! {} \
             ! openh264enc gop-size={fps} complexity=low ! h264parse ! {pay} )",
            pattern_caps(*size, *fps)
        ),
        // openh264enc does not always take another size.
        Media::Changing { size, fps } => format!(
            "( videotestsrc is-live=true pattern=ball ! capsfilter name=shape caps={} \
             ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={fps} ! h264parse \
             ! {pay} )",
            pattern_caps(*size, *fps)
        ),
        Media::H265 { size: (width, height), fps } => format!(
            "( videotestsrc is-live=true pattern=ball \
             ! video/x-raw,format=I420,width={width},height={height},framerate={fps}/1 \
             ! x265enc tune=zerolatency speed-preset=ultrafast key-int-max={fps} ! h265parse \
             ! rtph265pay name=pay0 pt=96 config-interval=-1 )"
        ),
        Media::Jpeg { size: (width, height), fps } => format!(
            "( videotestsrc is-live=true pattern=ball \
             ! video/x-raw,format=I420,width={width},height={height},framerate={fps}/1 \
             ! jpegenc ! rtpjpegpay name=pay0 pt=26 )"
        ),
        Media::H265File(path) => format!(
            "( filesrc location=\"{}\" ! qtdemux ! h265parse \
             ! rtph265pay name=pay0 pt=96 config-interval=-1 )",
            path.display()
        ),
        Media::File { path, times } => {
            let path = path.display();
            if *times == 1 {
                return format!("( filesrc location=\"{path}\" ! qtdemux ! h264parse ! {pay} )");
            }
            let parts: String = (0..*times)
                .map(|_| format!("filesrc location=\"{path}\" ! qtdemux ! h264parse ! c. "))
                .collect();
            format!("( concat name=c ! {pay} {parts} )")
        }
    }
}

#[test]
fn a_server_that_is_stopped_before_it_has_begun_to_run_ends() {
    for _ in 0..200 {
        drop(Server::start(&Media::Pattern { size: (320, 240), fps: 10 }, 0, None));
    }
}
