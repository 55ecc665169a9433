-- read
--
-- Commit a transaction that changes no table, to see whether the database takes writes. It has to
-- wait for a synchronous standby as any other write does. Logical replication slots get a message,
-- which nobody needs to read. A standby and a read-only database refuse to lock rows, and so they
-- refuse this, although no row is locked.
-- It is marked as a read, so that probes share one call, and so that its success does not end the
-- log lines of a failing database: it also succeeds while the disk has no room for rows.
SELECT pg_logical_emit_message(true, 'incidents', 'ready'),
       EXISTS (SELECT FROM incidents WHERE false FOR KEY SHARE);
