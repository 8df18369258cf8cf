package authority

import (
	"database/sql"
	"encoding/json"
	"fmt"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// about is what of an ask decides what can become of its grants, and what the log says with
// them. It is kept beside the ask's bytes, so that nothing has to be read of these, which may be
// long, shed or damaged, to take back what was granted.
type about struct {
	Session  string           `json:"session"`
	Digest   string           `json:"digest"`
	Rule     string           `json:"rule"`
	Exposure nucleus.Legs     `json:"exposure"`
	Passage  *nucleus.Passage `json:"passage,omitempty"`
}

func aboutOf(ask nucleus.AskRequest) about {
	return about{ask.Session, ask.Digest, ask.Rule, ask.Context.Exposure, ask.Passage}
}

// readAbout reads what is kept of an ask of an operation. Of one that is not known a passage may
// stand as long as any.
func readAbout(raw string, op nucleus.Op) (a about) {
	if json.Unmarshal([]byte(raw), &a) != nil && (op == nucleus.NetConnect || op == nucleus.WebFetch) {
		return about{Passage: &nucleus.Passage{Millis: approval.MaxPassage}}
	}
	return a
}

// addAbout gives the asks of an earlier version what is kept beside their bytes.
func addAbout(tx *sql.Tx) error {
	var there bool
	if err := tx.QueryRow("SELECT EXISTS (SELECT 1 FROM pragma_table_info('asks') WHERE name = 'about')").Scan(&there); err != nil || there {
		return err
	}
	if _, err := tx.Exec("ALTER TABLE asks ADD COLUMN about TEXT NOT NULL DEFAULT ''"); err != nil {
		return err
	}
	ids, err := idsIn(tx, "SELECT id FROM asks WHERE LENGTH(canonical) > 0")
	if err != nil {
		return err
	}
	for _, id := range ids { // one after the other: each may be long
		var raw []byte
		if err := tx.QueryRow("SELECT canonical FROM asks WHERE id = ?", id).Scan(&raw); err != nil {
			return err
		}
		ask, _, _, err := approval.Parse(raw)
		if err != nil {
			continue // damaged
		}
		kept, err := nucleus.Canonical(aboutOf(ask))
		if err != nil {
			return err
		}
		if _, err := tx.Exec("UPDATE asks SET about = ? WHERE id = ?", string(kept), id); err != nil {
			return fmt.Errorf("ask %s: %w", id, err)
		}
	}
	return nil
}

func idsIn(tx *sql.Tx, query string) (ids []string, err error) {
	rows, err := tx.Query(query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, rows.Err()
}

type askRow struct {
	id, digest       string
	length           int64 // of its bytes; 0: they were shed
	about            about
	pod              string
	op               nucleus.Op
	summary          string
	need             int
	created, expires int64
	state            string
	reason           string
	grants           []client.Given
	uses             int
	ended            int64 // when it was decided or taken back
}

// stateAt is the state of the ask at a time: one that too few decided expires.
func (r askRow) stateAt(now int64) string {
	if r.state == client.Pending && now >= r.expires {
		return client.Expired
	}
	return r.state
}

// status is what came of the ask at a time. The tokens are handed out once all are there, and
// as long as they are good.
func (r askRow) status(now int64) client.Status {
	status := client.Status{ID: r.id, State: r.stateAt(now), AskDigest: r.digest, Need: r.need, Reason: r.reason}
	for _, g := range r.grants {
		g.Task = taskOf(g)
		if status.State != client.Granted {
			g.Token = ""
		}
		status.Grants = append(status.Grants, g)
	}
	return status
}

// taskOf is the task that a grant is for, as its token says; nil for one use.
func taskOf(g client.Given) *nucleus.Task {
	claims, err := approval.Claims(g.Token)
	if err != nil {
		return nil // it was made here
	}
	return claims.Task
}

// task is what all that granted r chose; nil for one use, or where nobody has yet.
func (r askRow) task() *nucleus.Task {
	if len(r.grants) == 0 {
		return nil
	}
	return taskOf(r.grants[0])
}

// ask is what the log says of the ask.
func (r askRow) ask() nucleus.AskRequest {
	return nucleus.AskRequest{
		ID: r.id, Pod: r.pod, Session: r.about.Session, Action: nucleus.Action{Op: r.op}, Digest: r.about.Digest, Rule: r.about.Rule,
		Context: nucleus.Context{Exposure: r.about.Exposure}, Passage: r.about.Passage,
	}
}

// shed reports whether the bytes of an ask that has ended were forgotten.
func (r askRow) shed() bool { return r.length == 0 }

// over is when nothing of an ask could be decided or used any more, at the latest.
func (r askRow) over() int64 {
	end := max(r.expires, r.ended)
	if task := r.task(); task != nil {
		end = max(end, task.Until)
	}
	if r.about.Passage != nil {
		end += r.about.Passage.Millis
	}
	return end
}

// given is the grant of an approver, if there is one.
func (r askRow) given(approver string) (client.Given, bool) {
	for _, g := range r.grants {
		if g.Approver == approver {
			return g, true
		}
	}
	return client.Given{}, false
}

func (r askRow) grantIDs() (ids []string) {
	for _, g := range r.grants {
		ids = append(ids, g.Grant)
	}
	return ids
}
