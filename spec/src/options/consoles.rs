//! The options of the serial port and the consoles.

use serde_json::{Value, json};

use super::kinds::PCI;
use super::{Form, OptionError, error, fields, split, typed};
use crate::console::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, SerialConfig};

/// `--serial off|null|pty|tty|file=PATH|socket=PATH`.
///
/// # Errors
/// Fails if the text has another form.
pub fn serial(text: &str) -> Result<SerialConfig, OptionError> {
    let (mode, path) = console_mode("--serial", text)?;
    let mut config = SerialConfig::with_mode(mode);
    match mode {
        ConsoleMode::File => config.file = path,
        ConsoleMode::Socket => config.socket = path,
        _ => {}
    }
    Ok(config)
}

/// `--console off|null|pty|tty|file=PATH|socket=PATH`, with `iommu=on` and the like behind it.
///
/// # Errors
/// Fails if the text has another form.
pub fn console(text: &str) -> Result<ConsoleConfig, OptionError> {
    const NAME: &str = "--console";
    let parts = split(text).map_err(|reason| error(NAME, reason))?;
    let (mode, path) = console_mode(NAME, parts.first().map_or("", String::as_str))?;
    let mut fields = fields(NAME, &parts.get(1..).unwrap_or_default().join(","), PCI)?;
    fields.insert("mode".into(), json!(mode));
    match (mode, path) {
        (ConsoleMode::File, Some(path)) => fields.insert("file".into(), json!(path)),
        (ConsoleMode::Socket, Some(path)) => fields.insert("socket".into(), json!(path)),
        _ => None,
    };
    typed(NAME, &Value::Object(fields))
}

/// `--debug-console off|null|pty|tty|file=PATH`, with `iobase=0xe9` behind it.
///
/// # Errors
/// Fails if the text has another form.
pub fn debug_console(text: &str) -> Result<DebugConsoleConfig, OptionError> {
    const NAME: &str = "--debug-console";
    let parts = split(text).map_err(|reason| error(NAME, reason))?;
    let (mode, path) = console_mode(NAME, parts.first().map_or("", String::as_str))?;
    let rest = parts.get(1..).unwrap_or_default().join(",");
    let mut rest = fields(NAME, &rest, &[("iobase", "iobase", Form::Text)])?;
    let iobase = match rest.remove("iobase").as_ref().and_then(Value::as_str) {
        None => None,
        Some(text) => {
            let digits = text.strip_prefix("0x");
            let port = digits.map_or_else(|| text.parse(), |hex| u16::from_str_radix(hex, 16));
            Some(port.map_err(|_| error(NAME, format!("iobase={text} is not a port like 0xe9")))?)
        }
    };
    Ok(DebugConsoleConfig {
        file: path.filter(|_| mode == ConsoleMode::File),
        mode,
        iobase,
    })
}

fn console_mode(option: &str, text: &str) -> Result<(ConsoleMode, Option<String>), OptionError> {
    let (word, path) = match text.split_once('=') {
        Some((word, path)) => (word, Some(path.to_owned())),
        None => (text, None),
    };
    let mode = match (word, &path) {
        ("off", None) => ConsoleMode::Off,
        ("null", None) => ConsoleMode::Null,
        ("pty", None) => ConsoleMode::Pty,
        ("tty", None) => ConsoleMode::Tty,
        ("file", Some(path)) if !path.is_empty() => ConsoleMode::File,
        ("socket", Some(path)) if !path.is_empty() => ConsoleMode::Socket,
        _ => {
            let reason = format!("`{text}` must be off, null, pty, tty, file=PATH or socket=PATH");
            return Err(error(option, reason));
        }
    };
    Ok((mode, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles() {
        assert_eq!(serial("tty").unwrap().mode, ConsoleMode::Tty);
        assert_eq!(serial("file=/a,b").unwrap().file.as_deref(), Some("/a,b"));
        assert_eq!(
            console("socket=/s,iommu=on").unwrap().socket.as_deref(),
            Some("/s")
        );
        for none in ["", "file", "file=", "tty=1", "telnet"] {
            assert!(serial(none).is_err(), "{none}");
        }
        let debug = debug_console("file=/a,iobase=0x402").unwrap();
        assert_eq!((debug.file.as_deref(), debug.port()), (Some("/a"), 0x402));
        let debug = debug_console("off,iobase=233").unwrap();
        assert_eq!((debug.mode, debug.port()), (ConsoleMode::Off, 0xe9));
        for none in ["tty,iobase=0x10000", "tty,iobase=e9", "tty,id=x", "file"] {
            assert!(debug_console(none).is_err(), "{none}");
        }
    }
}
