-- There is nothing to undo, because the rollback of 0003 drops the columns.
DO $$
BEGIN
END
$$;
