// Package subids has tests run as a person with subordinate ids.
package subids

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// asWithSubIDs becomes a user that stands in tables of $1's own, which the host
// never sees: they are mounted over its own in a mount namespace of the command's.
const asWithSubIDs = `mount --make-rprivate / || exit
for table in passwd group subuid subgid; do mount --bind "$1/$table" "/etc/$table" || exit; done
id=$2; shift 2
exec setpriv --reuid "$id" --regid "$id" --groups "$id,4" -- "$@"`

// As returns a command that runs its arguments as a user with 65,536 subordinate
// ids, from firstUID and firstGID on, and one group more than its own; dir keeps
// the tables. The error says why this host cannot. Only root may run it.
func As(dir string, id, firstUID, firstGID int) ([]string, error) {
	for _, name := range []string{"newuidmap", "newgidmap", "setpriv", "unshare"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, err
		}
	}
	for name, line := range map[string]string{
		"passwd": fmt.Sprintf("caltest:x:%d:%d::%s:/bin/sh\n", id, id, dir), "group": fmt.Sprintf("caltest:x:%d:\n", id),
		"subuid": fmt.Sprintf("caltest:%d:65536\n", firstUID), "subgid": fmt.Sprintf("caltest:%d:65536\n", firstGID),
	} {
		table, err := os.ReadFile("/etc/" + name)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), append(table, line...), 0o644); err != nil {
			return nil, err
		}
	}
	return []string{"unshare", "--mount", "sh", "-c", asWithSubIDs, "sh", dir, fmt.Sprint(id)}, nil
}
