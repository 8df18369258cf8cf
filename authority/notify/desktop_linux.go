package notify

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/godbus/dbus/v5"
)

// HasDesktop reports whether there is a session bus on which somebody may show notifications.
func HasDesktop(getenv func(string) string) bool { return busAddress(getenv) != "" }

// busAddress is that of the person's session bus, or empty. None is started.
func busAddress(getenv func(string) string) string {
	if address := getenv("DBUS_SESSION_BUS_ADDRESS"); address != "" {
		return address
	}
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) && !strings.ContainsAny(dir, ",;=%") {
		bus := filepath.Join(dir, "bus")
		if info, err := os.Stat(bus); err == nil && info.Mode().Type() == os.ModeSocket {
			return "unix:path=" + bus
		}
	}
	return ""
}

// Desktop shows a note through org.freedesktop.Notifications. It has no button: nothing that
// is clicked there decides.
func Desktop(ctx context.Context, note Note, getenv func(string) string) error {
	address := busAddress(getenv)
	if address == "" {
		return fmt.Errorf("no session bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR/bus")
	}
	conn, err := dbus.Connect(address, dbus.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("session bus: %w", err)
	}
	defer conn.Close()
	title, body := note.Text()
	call := conn.Object("org.freedesktop.Notifications", "/org/freedesktop/Notifications").CallWithContext(ctx, "org.freedesktop.Notifications.Notify", 0,
		"CAL", uint32(0), "", title, body, []string{}, map[string]dbus.Variant{}, int32(-1))
	if call.Err != nil {
		return fmt.Errorf("notification: %w", call.Err)
	}
	return nil
}
